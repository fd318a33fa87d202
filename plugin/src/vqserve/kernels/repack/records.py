"""Planes of the checkpoint to the order in which the look-up-table kernel reads them.

A matrix [R, C] becomes records of 32 rows x 32 codes, `[table][row block][half][record]`: a table is 64 codes' columns,
its half one record; the last table has one half if that is all there is. C is padded with scales of 0 to 32 codes. A
record holds, in bytes:

    codes    [2 phases][32 lanes][16]     lane l is row l; phase q, byte j is the code of column `_columns(d)[l, q, j]`
    nibbles  [32 lanes][2 phases][8]      with refinement; byte 4 h + k: low nibble code 8 h + k, high 8 h + 4 + k
    scales   [32 lanes][1 or 2]           fp16, in the order of the phases; one if the record's columns are one group

Lanes start at different columns, so that at every step the 32 lanes of a warp read 32 different columns' table entries,
which lie in 32 different banks. Where C needs no padding a matrix keeps its size to the byte.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn.functional import pad

from vqserve.format.tiers import GROUP, Tier
from vqserve.reference.pack import unpack, unpack_scales

LANES = CODES = 32
"""Rows and codes per row of a record."""


def record_bytes(tier: Tier) -> int:
    """Bytes of one record."""
    return tier.weight_bytes(LANES, CODES * tier.d)


def matrix_bytes(tier: Tier, rows: int, columns: int) -> int:
    """Bytes of a whole matrix of [rows, columns] weights in records."""
    return rows // LANES * _halves(tier, columns) * record_bytes(tier)


def pack_records(planes: Mapping[str, Tensor], tier: Tier, proj: str) -> Tensor:
    """One matrix as records.

    Args:
        planes: `codes`, `scales` and, if the tier has one, `refinement`, in the stored layout; any device.
        tier: How they are encoded; rows are a multiple of 32.
        proj: gate_proj, up_proj or down_proj; decides the stored layout.

    Returns:
        uint8 [matrix_bytes] on the same device.
    """
    base, refinement = unpack(planes, tier, proj)
    halves = _halves(tier, base.shape[1] * tier.d)
    order = _columns(tier.d).to(base.device)  # [lane, phase, 16]
    codes = _per_lane(base, halves, order)  # [half, row block, lane, phase, 16]
    parts = [codes.transpose(2, 3).flatten(2)]
    if refinement is not None:
        quads = _per_lane(refinement, halves, order).unflatten(-1, (2, 2, 4))
        parts.append((quads[..., 0, :] | quads[..., 1, :] << 4).flatten(2))
    scales = unpack_scales(planes["scales"], proj)
    groups = CODES * tier.d // GROUP
    scales = pad(scales, (0, halves * groups - scales.shape[1])).reshape(-1, LANES, halves, groups)
    if groups == 2:
        scales = torch.cat((scales[:, : LANES // 2], scales[:, LANES // 2 :].flip(-1)), dim=1)
    parts.append(scales.permute(2, 0, 1, 3).flatten(2).contiguous().view(torch.uint8))
    records = torch.cat([part.to(torch.uint8) for part in parts], dim=-1)  # [half, row block, bytes]
    whole = halves // 2 * 2
    pairs = records[:whole].unflatten(0, (-1, 2)).transpose(1, 2)
    return torch.cat((pairs.flatten(), records[whole:].flatten()))


def _halves(tier: Tier, columns: int) -> int:
    return -(-columns // (CODES * tier.d))


def _columns(d: int) -> Tensor:
    """Which of a record's 32 codes stands at [lane, phase, byte]."""
    lane, byte = torch.arange(LANES)[:, None, None], torch.arange(16)
    phase = torch.arange(2)[:, None]
    if d == 4:
        return (16 * phase + byte + lane) % CODES
    return 16 * (phase ^ (lane >= LANES // 2).long()) + (byte + lane) % 16


def _per_lane(codes: Tensor, halves: int, order: Tensor) -> Tensor:
    """Codes [R, C/d] as uint8 [half, row block, lane, phase, 16]."""
    padded = pad(codes.to(torch.uint8), (0, halves * CODES - codes.shape[1])).reshape(-1, LANES, halves, CODES)
    index = order.flatten(1)[None, :, None].expand(len(padded), -1, halves, -1)
    rotated: Tensor = padded.gather(-1, index).permute(2, 0, 1, 3).unflatten(-1, (2, 16))
    return rotated
