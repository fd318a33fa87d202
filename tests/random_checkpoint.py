"""A complete vqserve checkpoint of random codes, and the same weights dequantized to an ordinary bf16 checkpoint.

Serving both must give the same logits: that tests loading and applying without any encoder.
"""

from __future__ import annotations

import json
import math
import random
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from random_parent import write_json, write_weights
from vqserve.format.config import PROJECTIONS, QuantConfig, Spine, VQModule
from vqserve.format.geometry import Geometry
from vqserve.format.layout import spine_modules
from vqserve.format.manifest import write_manifest
from vqserve.format.names import codebook_name, expert_tensor
from vqserve.format.tiers import GROUP, TIERS
from vqserve.reference.dequantize import Codebook, dequantize
from vqserve.reference.pack import pack, pack_scales

COPIED = ("generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


def make_random_checkpoint(
    parent: Path,
    checkpoint: Path,
    dequantized: Path | None = None,
    *,
    seed: int = 0,
    spine: bool = True,
    files: int = 2,
) -> Path:
    """Writes `checkpoint` (random codes, 4-bit spine) and `dequantized` (its weights in the parent's layout).

    Every MoE layer uses all four tiers in every projection, but the last one, if there are several, only tiers without
    refinement.

    Args:
        parent: A bf16 GLM-MoE-DSA checkpoint; all that is not quantized is copied from it.
        checkpoint: Folder of the vqserve checkpoint.
        dequantized: Folder of the bf16 checkpoint; None to leave it out.
        seed: Same seed, same bytes.
        spine: Whether the spine goes to 4 bit, by rounding to nearest.
        files: Into how many safetensors files the weights go.
    """
    config = json.loads((parent / "config.json").read_text(encoding="utf-8"))
    geometry, tensors = Geometry.from_dict(config), read_tensors(parent)
    generator, chooser = torch.Generator().manual_seed(seed), random.Random(seed)
    packed, plain = dict(tensors), dict(tensors)
    codebooks = {letter: _random_codebook(letter, generator) for letter in TIERS}
    modules = []
    for name in geometry.experts_modules:
        letters = "ac" if name == geometry.experts_modules[-1] and len(geometry.experts_modules) > 1 else "abcd"
        module = VQModule(name, {proj: _mix(letters, geometry.n_routed_experts, chooser) for proj in PROJECTIONS})
        modules.append(module)
        for expert in range(module.experts):
            for proj in PROJECTIONS:
                codebook = codebooks[module.tier(expert, proj).id]
                planes = _random_planes(codebook, proj, *geometry.expert_shape(proj), generator)
                weight = expert_tensor(name, expert, proj, "weight")
                del packed[weight]
                packed |= {expert_tensor(name, expert, proj, part): plane for part, plane in planes.items()}
                plain[weight] = dequantize(planes, codebook, proj, torch.bfloat16)
        for tier in module.used_tiers():
            codebook = codebooks[tier.id]
            # Every layer has tensors of its own: safetensors refuses shared storage.
            packed[codebook_name(name, tier.id)] = codebook.base.clone()
            if codebook.refinement is not None:
                packed[codebook_name(name, tier.id, refinement=True)] = codebook.refinement.clone()
    linears = spine_modules(geometry) if spine else ()
    for name in linears:
        parts, plain[f"{name}.weight"] = round_to_gptq(packed.pop(f"{name}.weight"))
        packed |= {f"{name}.{part}": tensor for part, tensor in parts.items()}
    quant = QuantConfig(modules=tuple(modules), spine=Spine(modules=linears) if spine else None)
    _write(checkpoint, parent, {**config, "quantization_config": quant.to_dict()}, packed, files)
    (checkpoint / "README.md").write_text("Random codes, for tests.\n", encoding="utf-8")
    write_manifest(checkpoint)
    if dequantized is not None:
        _write(dequantized, parent, config, plain, files)
    return checkpoint


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of a sharded safetensors checkpoint."""
    index = json.loads((folder / "model.safetensors.index.json").read_text(encoding="utf-8"))["weight_map"]
    tensors: dict[str, Tensor] = {}
    for file in sorted(set(index.values())):
        with safe_open(folder / file, "pt") as opened:
            tensors |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - not a dictionary
    return tensors


def round_to_gptq(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """4-bit GPTQ tensors of a weight [N, K] by rounding to nearest, and the weight [N, K] that they stand for."""
    rows, columns = weight.shape
    groups = weight.float().view(rows, columns // GROUP, GROUP)
    scales = (groups.abs().amax(-1) / 7).clamp_min(1e-6).bfloat16()
    codes = (groups / scales.float()[..., None]).round().clamp(-8, 7)
    rounded = (codes * scales.float()[..., None]).view(rows, columns).to(weight.dtype)
    nibbles = (codes.view(rows, columns).t().to(torch.int64) + 8).reshape(columns // 8, 8, rows)
    words = (nibbles << (4 * torch.arange(8))[:, None]).sum(1)
    zeros = torch.full((columns // GROUP, rows // 8), 0x77777777, dtype=torch.int32)
    # int64 to int32 keeps the low 32 bits, the sign bit included.
    return {"qweight": words.to(torch.int32), "scales": scales.t().contiguous(), "qzeros": zeros}, rounded


def _random_codebook(letter: str, generator: torch.Generator) -> Codebook:
    tier = TIERS[letter]
    base = torch.randn(tier.base_rows, tier.d, generator=generator).half()
    if not tier.refinement_rows:
        return Codebook(tier, base)
    return Codebook(tier, base, (0.3 * torch.randn(tier.refinement_rows, tier.d, generator=generator)).half())


def _random_planes(
    codebook: Codebook, proj: str, rows: int, columns: int, generator: torch.Generator
) -> dict[str, Tensor]:
    tier, shape = codebook.tier, (rows, columns // codebook.tier.d)
    base = torch.randint(tier.base_rows, shape, generator=generator)
    refinement = torch.randint(16, shape, generator=generator) if tier.refinement_rows else None
    scales = (0.5 + torch.rand(rows, columns // GROUP, generator=generator)) / math.sqrt(columns)
    return {**pack(base, refinement, tier, proj), "scales": pack_scales(scales.half(), proj)}


def _mix(letters: str, experts: int, chooser: random.Random) -> str:
    mixed = [letters[at] if at < len(letters) else chooser.choice(letters) for at in range(experts)]
    chooser.shuffle(mixed)
    return "".join(mixed)


def _write(folder: Path, parent: Path, config: dict[str, Any], tensors: dict[str, Tensor], files: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name in COPIED:
        shutil.copyfile(parent / name, folder / name)
    write_json(folder / "config.json", config)
    write_weights(folder, tensors, files)
