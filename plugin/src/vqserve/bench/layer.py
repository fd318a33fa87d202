"""One layer's routed experts at a real model's sizes, with random codes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from vqserve.checkpoint.assume import assumed
from vqserve.format.config import QuantConfig
from vqserve.format.flat import flat_layout
from vqserve.format.geometry import Geometry
from vqserve.format.tiers import Tier
from vqserve.reference.dequantize import Codebook
from vqserve.reference.moe import Experts


def random_layer(config: Mapping[str, Any], mix: Mapping[str, float], ranks: int, seed: int) -> Experts:
    """The experts of one of `ranks` tensor-parallel ranks, on the GPU, in the checkpoint's order.

    Args:
        config: A parsed `config.json` without `quantization_config`.
        mix: Shares of the tiers, by id.
        ranks: How many ranks share every expert.
        seed: Which codes, scales and codewords.
    """
    geometry = Geometry.from_dict(config)
    module = QuantConfig.from_dict(assumed(config, mix)["quantization_config"]).modules[0]
    layout = flat_layout(module, geometry, tp_size=ranks)
    generator = torch.Generator("cuda").manual_seed(seed)
    buffers = {
        name: _scales(size, geometry, generator) if name.endswith("scales") else _codes(size, generator)
        for name, size in layout.sizes.items()
    }
    return Experts(layout, buffers, {tier.id: _codebook(tier, generator) for tier in module.used_tiers()})


def random_routing(tokens: int, hidden: int, experts: int, top_k: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Activations bf16 [T, H], weights fp32 [T, k], and expert ids int32 [T, k] that differ within a token."""
    generator = torch.Generator("cuda").manual_seed(seed)
    x = torch.randn(tokens, hidden, generator=generator, device="cuda").bfloat16()
    weights, ids = torch.rand(tokens, experts, generator=generator, device="cuda").topk(top_k)
    return x, weights, ids.int()


def bytes_read(experts: Experts, ids: Tensor) -> int:
    """Bytes of codes and scales of all experts that `ids` names, each once."""
    slots = [slot for expert in ids.unique().tolist() for slot in experts.layout.slots[expert].values()]
    return sum(slot.tier.weight_bytes(slot.rows, slot.columns) for slot in slots)


def _codes(size: int, generator: torch.Generator) -> Tensor:
    return torch.randint(256, (size,), dtype=torch.uint8, generator=generator, device="cuda")


def _scales(size: int, geometry: Geometry, generator: torch.Generator) -> Tensor:
    scales: Tensor = (0.5 + torch.rand(size, generator=generator, device="cuda")) / geometry.hidden_size**0.5
    return scales.half()


def _codebook(tier: Tier, generator: torch.Generator) -> Codebook:
    base = torch.randn(tier.base_rows, tier.d, generator=generator, device="cuda").half()
    if not tier.refinement_rows:
        return Codebook(tier, base)
    return Codebook(
        tier, base, (0.3 * torch.randn(tier.refinement_rows, tier.d, generator=generator, device="cuda")).half()
    )
