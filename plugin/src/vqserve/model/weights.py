"""A model's weights by name, read when they are asked for: of an unquantized checkpoint, or dequantized from codes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from math import isfinite
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from vqserve.format.config import PROJECTIONS
from vqserve.format.errors import CheckpointError, TensorError
from vqserve.format.files import Checkpoint, check_checkpoint, check_parent, read_config
from vqserve.format.geometry import Geometry
from vqserve.format.headers import StoredTensor
from vqserve.format.layout import parent_specs
from vqserve.format.names import codebook_name, expert_tensor, experts_module, parse_expert_tensor
from vqserve.format.strict_json import read_object
from vqserve.format.tiers import TIERS
from vqserve.reference.dequantize import Codebook, dequantize
from vqserve.reference.gptq import dequantize_gptq
from vqserve.reference.tensors import read_tensor

LARGEST = 65504.0
"""Largest value that a weight may have: float16's, which the scales are stored in."""
_DOWNLOAD = "download the parent checkpoint again, as its makers publish it"


class Model(ABC):
    """A GLM-MoE-DSA model. Nothing is kept of what is read.

    Attributes:
        config: Its `config.json`, parsed, as transformers' class takes it.
        geometry: The model's sizes.
    """

    config: Mapping[str, Any]
    geometry: Geometry

    @property
    @abstractmethod
    def names(self) -> Iterable[str]:
        """The names of all weights, as an unquantized checkpoint has them."""

    @abstractmethod
    def tensor(self, name: str) -> Tensor:
        """One weight, on the CPU."""

    def layer(self, layer: int) -> dict[str, Tensor]:
        """All tensors of a layer but those of routed experts and indexer, by name without `model.layers.N.`."""
        stem = f"model.layers.{layer}."
        left_out = (f"{experts_module(layer)}.", f"{stem}self_attn.indexer.")
        names = [name for name in self.names if name.startswith(stem) and not name.startswith(left_out)]
        return {name.removeprefix(stem): self.tensor(name) for name in names}

    def expert(self, layer: int, expert: int) -> dict[str, Tensor]:
        """The three projections of a routed expert, `[R, C]` each."""
        module = experts_module(layer)
        return {proj: self.tensor(expert_tensor(module, expert, proj, "weight")) for proj in PROJECTIONS}

    def expert_weights(self, layer: int, experts: Sequence[int], device: torch.device) -> dict[str, Tensor]:
        """The three projections of several routed experts: float32 `[B, R, C]` on a device."""
        found = [self.expert(layer, expert) for expert in experts]
        return {proj: torch.stack([expert[proj] for expert in found]).to(device, torch.float32) for proj in PROJECTIONS}


class StoredModel(Model):
    """An unquantized checkpoint, in bf16 or another float dtype.

    Attributes:
        folder: Where it lies.
        tensors: Where each tensor is, by name.
    """

    def __init__(self, folder: Path) -> None:
        """Opens the checkpoint; compares names, shapes and dtypes with what its configuration calls for.

        Raises:
            CheckpointError: There is no checkpoint, or it is quantized already, damaged, incomplete, or holds a tensor
                that this architecture has no place for.
        """
        checked = check_parent(folder)
        self.folder, self.config = folder, checked.config
        self.geometry, self.tensors = checked.geometry, checked.tensors

    @property
    def names(self) -> Iterable[str]:
        """The names of all weights."""
        return self.tensors

    def tensor(self, name: str) -> Tensor:
        """Reads one tensor, in its stored dtype, onto the CPU.

        Raises:
            TensorError: It holds NaN, infinity or what no weight is; a flipped bit of an exponent makes any of them.
        """
        stored = self.tensors[name]
        tensor = read_tensor(stored)
        low, high = tensor.aminmax()
        if not (low >= -LARGEST and high <= LARGEST):
            place = (~(tensor.abs() <= LARGEST)).nonzero()[0].tolist()
            found = tensor[tuple(place)].item()
            expected = f"values of at most {LARGEST:g}" if isfinite(found) else "finite values"
            problem = f"expected {expected}, found {found} at {place}"
            raise TensorError(f"{stored.path}: {name}", problem, _DOWNLOAD)
        return tensor


class DequantizedModel(Model):
    """A vqserve checkpoint, as the weights that its codes stand for: fp32, the rest in its stored dtype."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.config = {key: value for key, value in checkpoint.config.items() if key != "quantization_config"}
        self.geometry = checkpoint.geometry
        self._checkpoint = checkpoint
        self._spine = frozenset(checkpoint.quant.spine.modules if checkpoint.quant.spine else ())
        self._encoded = {module.name: module for module in checkpoint.quant.modules}

    @cached_property
    def names(self) -> Iterable[str]:
        """The names of all weights, as its parent has them."""
        stored = self._checkpoint.tensors
        return [name for name in parent_specs(self.geometry) if name in stored or self._is_encoded(name)]

    def tensor(self, name: str) -> Tensor:
        """One weight, dequantized if it is stored so."""
        expert = parse_expert_tensor(name)
        if expert is not None and expert.module in self._encoded:
            letter = self._encoded[expert.module].tiers[expert.proj][expert.expert]
            parts = ["codes", "scales"] + (["refinement"] if TIERS[letter].refinement_rows else [])
            planes = {part: self._read(expert_tensor(*expert[:3], part)) for part in parts}
            return dequantize(planes, self._codebook(expert.module, letter), expert.proj)
        stem = name.removesuffix(".weight")
        if stem in self._spine:
            return dequantize_gptq(self._read(f"{stem}.qweight"), self._read(f"{stem}.scales"))
        return self._read(name)

    def _is_encoded(self, name: str) -> bool:
        expert = parse_expert_tensor(name)
        return (expert is not None and expert.module in self._encoded) or name.removesuffix(".weight") in self._spine

    def _codebook(self, module: str, letter: str) -> Codebook:
        base = self._read(codebook_name(module, letter))
        refined = TIERS[letter].refinement_rows
        return Codebook(TIERS[letter], base, self._read(codebook_name(module, letter, True)) if refined else None)

    def _read(self, name: str) -> Tensor:
        stored: StoredTensor = self._checkpoint.tensors[name]
        return read_tensor(stored)


def open_model(folder: Path) -> Model:
    """The model in a folder, quantized or not.

    Raises:
        CheckpointError: The folder holds no checkpoint, or a damaged one.
    """
    if read_config(folder).get("quantization_config") is None:
        return StoredModel(folder)
    return DequantizedModel(check_checkpoint(folder))


def open_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """A checkpoint's own tokenizer with its chat template.

    Raises:
        CheckpointError: There is none, or it cannot be read.
    """
    if not (folder / "tokenizer.json").is_file():
        raise CheckpointError(str(folder), "holds no tokenizer.json", "copy the parent's tokenizer files into it")
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if (folder / name).is_file():
            read_object(folder / name)
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # of transformers or of the tokenizers library, which raises that very class
        reason = str(error).partition("\n")[0]
        raise CheckpointError(f"{folder}", f"the tokenizer cannot be read ({reason})", _DOWNLOAD) from error
    return tokenizer
