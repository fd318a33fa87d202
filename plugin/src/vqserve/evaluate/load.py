"""Whole models in transformers: a parent as it is, a vqserve checkpoint with its weights dequantized."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoTokenizer, GlmMoeDsaConfig, GlmMoeDsaForCausalLM, PreTrainedTokenizerBase
from transformers.utils import logging

from vqserve.format.config import PROJECTIONS
from vqserve.format.errors import CheckpointError
from vqserve.format.files import Checkpoint, check_checkpoint, check_parent, read_config
from vqserve.format.geometry import Geometry
from vqserve.format.names import codebook_name, expert_tensor, layer_of
from vqserve.format.tiers import TIERS
from vqserve.format.variants import completed
from vqserve.reference.dequantize import Codebook, dequantize
from vqserve.reference.gptq import dequantize_gptq
from vqserve.reference.tensors import read_tensor


def load_model(folder: Path) -> GlmMoeDsaForCausalLM:
    """The model in fp32, its weights exactly those stored: bf16 of a parent, dequantized ones of a vqserve checkpoint.

    Raises:
        CheckpointError: The folder holds no checkpoint, or a damaged one.
    """
    config = read_config(folder)
    plain = config.get("quantization_config") is None
    weights = _stored(folder) if plain else dequantized(check_checkpoint(folder))
    unused = Geometry.from_dict(
        completed(config) if plain else config
    ).mtp_layers  # transformers' class does not have them
    state = {name: weight for name, weight in weights if layer_of(name) not in unused}
    stock = GlmMoeDsaConfig.from_dict({k: v for k, v in config.items() if k != "quantization_config"})
    with _quiet():
        model: GlmMoeDsaForCausalLM = GlmMoeDsaForCausalLM.from_pretrained(
            None, config=stock, state_dict=state, dtype=torch.float32
        )
    evaluated: GlmMoeDsaForCausalLM = model.eval()
    return evaluated


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The checkpoint's tokenizer.

    Raises:
        CheckpointError: It has none.
    """
    if not (folder / "tokenizer.json").is_file():
        raise CheckpointError(str(folder), "holds no tokenizer.json", "copy the parent's tokenizer files into it")
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder)
    return tokenizer


def dequantized(checkpoint: Checkpoint) -> Iterator[tuple[str, Tensor]]:
    """Every weight of a vqserve checkpoint under its parent's name, fp32."""

    def tensor(name: str) -> Tensor:
        return read_tensor(checkpoint.tensors[name])

    done: set[str] = set()
    for module in checkpoint.quant.modules:
        books = {}
        for tier in module.used_tiers():
            base = codebook_name(module.name, tier.id)
            refinement = codebook_name(module.name, tier.id, refinement=True) if tier.refinement_rows else None
            done.update(name for name in (base, refinement) if name)
            books[tier.id] = Codebook(TIERS[tier.id], tensor(base), tensor(refinement) if refinement else None)
        for proj in PROJECTIONS:
            for expert, letter in enumerate(module.tiers[proj]):
                parts = ["codes", "scales"] + (["refinement"] if TIERS[letter].refinement_rows else [])
                names = {part: expert_tensor(module.name, expert, proj, part) for part in parts}
                done.update(names.values())
                planes = {part: tensor(name) for part, name in names.items()}
                yield expert_tensor(module.name, expert, proj, "weight"), dequantize(planes, books[letter], proj)
    for name in checkpoint.quant.spine.modules if checkpoint.quant.spine else ():
        done.update(f"{name}.{part}" for part in ("qweight", "scales", "qzeros"))
        yield f"{name}.weight", dequantize_gptq(tensor(f"{name}.qweight"), tensor(f"{name}.scales"))
    for name in checkpoint.tensors:
        if name not in done:
            yield name, tensor(name).float()


def _stored(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Every weight of an unquantized checkpoint, fp32."""
    for name, stored in check_parent(folder).tensors.items():
        yield name, read_tensor(stored).float()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars of transformers' own, whatever they were before."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
