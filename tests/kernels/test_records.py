from __future__ import annotations

import pytest
import torch

from random_experts import random_planes
from vqserve.format.tiers import TIERS
from vqserve.kernels.repack.records import matrix_bytes, pack_records, record_bytes
from vqserve.reference.pack import unpack, unpack_scales


def _look(records: bytes, tier: str, row: int, code: int, shape: tuple[int, int]) -> tuple[int, int, bytes]:
    """Base code, refinement code and the scale's bytes of one code, read as the kernel reads them."""
    d, refined, (rows, columns) = TIERS[tier].d, bool(TIERS[tier].refinement_rows), shape
    halves, size, lane = -(-columns // (32 * d)), record_bytes(TIERS[tier]), row % 32
    half, at = divmod(code, 32)
    table = half // 2
    here = min(halves - 2 * table, 2)
    start = (table * (rows // 32) * 2 + row // 32 * here + half % 2) * size
    if d == 4:
        phase, byte = divmod((at - lane) % 32, 16)
    else:
        phase, byte = at // 16 ^ (lane >= 16), (at - lane) % 16
    base = records[start + 512 * phase + 16 * lane + byte]
    nibble = 0
    if refined:
        i, k = divmod(byte, 4)
        nibble = records[start + 1024 + 16 * lane + 8 * phase + 4 * (i // 2) + k] >> 4 * (i % 2) & 15
    scales = start + (1536 if refined else 1024)
    scale = scales + (2 * lane if d == 4 else 4 * lane + 2 * phase)
    return base, nibble, records[scale : scale + 2]


@pytest.mark.parametrize("proj", ["gate_proj", "down_proj"])
@pytest.mark.parametrize("columns", [128, 384, 512, 640, 1024])
@pytest.mark.parametrize("tier", "abcd")
def test_every_code_and_scale_stands_where_the_kernel_looks(tier: str, columns: int, proj: str, seed: int) -> None:
    rows = 64
    planes = random_planes(TIERS[tier], proj, rows, columns, torch.Generator().manual_seed(seed))
    base, refinement = unpack(planes, TIERS[tier], proj)
    scales = unpack_scales(planes["scales"], proj).contiguous()
    records = bytes(pack_records(planes, TIERS[tier], proj).numpy())
    assert len(records) == matrix_bytes(TIERS[tier], rows, columns)
    for row in range(rows):
        for code in range(base.shape[1]):
            found = _look(records, tier, row, code, (rows, columns))
            nibble = 0 if refinement is None else int(refinement[row, code])
            scale = bytes(scales[row, code * TIERS[tier].d // 128].view(1).view(torch.uint8).numpy())
            assert found == (int(base[row, code]), nibble, scale)


@pytest.mark.parametrize("tier", "abcd")
def test_records_take_no_more_room_than_planes(tier: str) -> None:
    assert matrix_bytes(TIERS[tier], 4096, 6144) == TIERS[tier].weight_bytes(4096, 6144)
