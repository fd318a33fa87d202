"""Codes and scales to their stored planes and back.

Planes are what the checkpoint holds (`format.layout` has the shapes): one byte per base code; two refinement codes per
byte, the low nibble for the even one. down_proj is stored group-major, `[C/128, R, ...]`, the others `[R, ...]`.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from vqserve.format.tiers import GROUP, Tier


def pack(codes: Tensor, refinement: Tensor | None, tier: Tier, proj: str) -> dict[str, Tensor]:
    """Packs the codes of one projection.

    Args:
        codes: Integer [R, C/d], values 0..255: rows of the codebook's base.
        refinement: Integer [R, C/d], values 0..15: rows of its refinement; None for a tier without refinement.
        tier: The tier they are codes of.
        proj: gate_proj, up_proj or down_proj; decides the layout.

    Returns:
        `codes` and, if the tier has one, `refinement`: uint8 in the stored layout.

    Raises:
        ValueError: A code is out of range, or there is a refinement too many or too few.
    """
    _check_codes(codes, tier.base_rows, "base")
    if (refinement is not None) != bool(tier.refinement_rows):
        raise ValueError(f"tier {tier.id}: {'expected' if tier.refinement_rows else 'takes no'} refinement codes")
    per_group = GROUP // tier.d
    planes = {"codes": _to_stored(codes.to(torch.uint8), per_group, proj)}
    if refinement is not None:
        _check_codes(refinement, tier.refinement_rows, "refinement")
        nibbles = refinement.to(torch.uint8)
        planes["refinement"] = _to_stored(nibbles[:, 0::2] | nibbles[:, 1::2] << 4, per_group // 2, proj)
    return planes


def unpack(planes: Mapping[str, Tensor], tier: Tier, proj: str) -> tuple[Tensor, Tensor | None]:
    """Inverse of `pack`: codes and refinement codes, int64 [R, C/d]; the latter None for a tier without refinement."""
    codes = _from_stored(planes["codes"], proj).long()
    if not tier.refinement_rows:
        return codes, None
    pairs = _from_stored(planes["refinement"], proj).long()
    return codes, torch.stack((pairs & 15, pairs >> 4), dim=-1).flatten(1)


def pack_scales(scales: Tensor, proj: str) -> Tensor:
    """Scales fp16 [R, C/128] in the stored layout: [C/128, R] for down_proj, unchanged for the others."""
    return scales.t().contiguous() if proj == "down_proj" else scales.contiguous()


def unpack_scales(stored: Tensor, proj: str) -> Tensor:
    """Inverse of `pack_scales`: fp16 [R, C/128]."""
    return stored.t() if proj == "down_proj" else stored


def _to_stored(plane: Tensor, per_group: int, proj: str) -> Tensor:
    if proj != "down_proj":
        return plane.contiguous()
    return plane.reshape(len(plane), -1, per_group).transpose(0, 1).contiguous()


def _from_stored(plane: Tensor, proj: str) -> Tensor:
    return plane.transpose(0, 1).flatten(1) if proj == "down_proj" else plane


def _check_codes(codes: Tensor, rows: int, plane: str) -> None:
    if codes.numel() and (int(codes.min()) < 0 or int(codes.max()) >= rows):
        raise ValueError(f"{plane} codes: expected 0..{rows - 1}, found {int(codes.min())}..{int(codes.max())}")
