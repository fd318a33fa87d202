"""Random codebooks, planes and whole sets of experts in flat buffers."""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch
from torch import Tensor

from random_parent import CONFIG
from vqserve.format.config import PROJECTIONS, VQModule
from vqserve.format.flat import flat_layout
from vqserve.format.geometry import Geometry
from vqserve.format.layout import plane_shape
from vqserve.format.tiers import TIERS, Tier
from vqserve.reference.dequantize import Codebook
from vqserve.reference.moe import Experts

GEOMETRY = Geometry.from_dict({**CONFIG, "hidden_size": 384, "moe_intermediate_size": 256, "n_routed_experts": 8})


def random_codebook(tier: Tier, generator: torch.Generator) -> Codebook:
    base = torch.randn(256, tier.d, generator=generator).half()
    if not tier.refinement_rows:
        return Codebook(tier, base)
    return Codebook(tier, base, (0.3 * torch.randn(16, tier.d, generator=generator)).half())


def random_planes(tier: Tier, proj: str, rows: int, columns: int, generator: torch.Generator) -> dict[str, Tensor]:
    shapes = {part: plane_shape(tier, proj, part, rows, columns) for part in ("codes", "refinement", "scales")}
    planes = {
        part: torch.randint(256, shapes[part], generator=generator).to(torch.uint8) for part in ("codes", "refinement")
    }
    if not tier.refinement_rows:
        del planes["refinement"]
    scale = (0.5 + torch.rand(shapes["scales"], generator=generator)) / columns**0.5
    return {**planes, "scales": scale.half()}


def random_experts(seed: int, experts: Sequence[int] | None = None, tp_size: int = 1, tp_rank: int = 0) -> Experts:
    """The experts of one rank; the same seed gives other ranks the rest of the same layer."""
    generator, chooser = torch.Generator().manual_seed(seed), random.Random(seed)
    letters = {proj: "".join(chooser.sample("abcdabcd", k=8)) for proj in PROJECTIONS}
    module = VQModule("model.layers.1.mlp.experts", letters)
    codebooks = {letter: random_codebook(tier, generator) for letter, tier in TIERS.items()}
    whole = [
        {
            proj: random_planes(module.tier(expert, proj), proj, *GEOMETRY.expert_shape(proj), generator)
            for proj in PROJECTIONS
        }
        for expert in range(module.experts)
    ]
    layout = flat_layout(module, GEOMETRY, experts, tp_size)
    buffers = {
        name: torch.zeros(size, dtype=torch.float16 if name.endswith("scales") else torch.uint8)
        for name, size in layout.sizes.items()
    }
    mine = Experts(layout, buffers, codebooks)
    for local, expert in enumerate(layout.experts):
        for proj in PROJECTIONS:
            for part, target in mine.planes(local, proj).items():
                target.copy_(whole[expert][proj][part].chunk(tp_size)[tp_rank])
    return mine
