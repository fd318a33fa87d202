"""Planes of the checkpoint to the order in which the kernels read them: every plane keeps its bytes, in its place.

A matrix [R, C] is cut into strips of 32 codes' columns and, within a strip, blocks of 32 rows. Lane l of a block is its
row l. If the codes of a tier with d = 8 end with half a strip, that one has the first phase alone, for all lanes.

    codes        [strip][block][2 phases][32 lanes][16]    phase q, byte j: the code of column `_columns()[l, q, j]`
    refinement   [strip][block][32 lanes][2 phases][8]     byte 4 h + k: low nibble code 8 h + k, high 8 h + 4 + k
    scales       [C / 128][R]

Lanes start at different columns, so that at every step the 32 lanes of a warp look 32 different columns up, which lie
in 32 different banks of shared memory; so do 16 lanes where a strip has one phase.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from vqserve.format.config import PROJECTIONS
from vqserve.format.tiers import Tier
from vqserve.reference.moe import Experts
from vqserve.reference.pack import unpack, unpack_scales

LANES = CODES = 32
"""Rows of a block and codes of a strip."""


def repack(experts: Experts) -> None:
    """Brings the planes in the buffers into the kernels' order, a matrix at a time, where they are.

    The experts must not be read as `Experts` afterwards.
    """
    for expert, row in enumerate(experts.layout.slots):
        for proj in PROJECTIONS:
            planes = experts.planes(expert, proj)
            for part, ordered in kernel_order(planes, row[proj].tier, proj).items():
                planes[part].view(-1).copy_(ordered)


def kernel_order(planes: Mapping[str, Tensor], tier: Tier, proj: str) -> dict[str, Tensor]:
    """One matrix's planes in the kernels' order.

    Args:
        planes: `codes`, `scales` and, if the tier has one, `refinement`, in the stored layout; any device.
        tier: How they are encoded; rows are a multiple of 32.
        proj: gate_proj, up_proj or down_proj; decides the stored layout.

    Returns:
        The same planes, flat, each with as many elements as before.
    """
    codes, refinement = unpack(planes, tier, proj)
    ordered = {"scales": unpack_scales(planes["scales"], proj).t().flatten()}
    ordered["codes"] = torch.cat([strip.transpose(2, 3).flatten() for strip in _per_lane(codes)])
    if refinement is not None:
        quads = [strip.unflatten(-1, (2, 2, 4)) for strip in _per_lane(refinement)]
        ordered["refinement"] = torch.cat([(q[..., 0, :] | q[..., 1, :] << 4).flatten() for q in quads])
    return ordered


def _columns() -> Tensor:
    """Which of a strip's 32 codes stands at [lane, phase, byte]."""
    lane, phase, byte = torch.arange(LANES)[:, None, None], torch.arange(2)[:, None], torch.arange(16)
    return 16 * (phase ^ (lane >= LANES // 2).long()) + (byte + lane) % 16


def _per_lane(codes: Tensor) -> list[Tensor]:
    """Codes [R, C/d] as uint8 [strip, block, lane, phase, 16]: the whole strips and, if there is one, the half."""
    rows = codes.to(torch.uint8).unflatten(0, (-1, LANES))  # [block, lane, C/d]
    whole = codes.shape[1] // CODES * CODES
    order = _columns().to(codes.device)
    strips = rows[..., :whole].unflatten(-1, (-1, CODES)).permute(2, 0, 1, 3)
    parts = [_chosen(strips, order)]
    if whole < codes.shape[1]:
        parts.append(_chosen(rows[None, ..., whole:], order[:, :1] % 16))
    return parts


def _chosen(strips: Tensor, order: Tensor) -> Tensor:
    """Codes [strip, block, lane, column] at the columns `order` [lane, phase, byte] of each lane."""
    index = order.flatten(1).expand(*strips.shape[:2], -1, -1)
    chosen: Tensor = strips.gather(-1, index).unflatten(-1, order.shape[1:])
    return chosen
