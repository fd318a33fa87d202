from __future__ import annotations

import pytest
import torch
from torch import Tensor

from random_experts import random_experts, random_planes
from vqserve.format.config import PROJECTIONS
from vqserve.format.tiers import TIERS
from vqserve.kernels.experts import codebooks_of, codeword_table
from vqserve.kernels.repack.order import kernel_order, repack
from vqserve.reference.pack import unpack, unpack_scales


def _look(planes: dict[str, Tensor], row: int, code: int, rows: int, codes: int) -> tuple[int, int]:
    """Base code and refinement code, read as the kernels read them."""
    (strip, at), (block, lane) = divmod(code, 32), divmod(row, 32)
    whole, byte = strip < codes // 32, (at - lane) % 16
    phase = at // 16 ^ (lane >= 16) if whole else 0
    phases = 2 if whole else 1
    base = planes["codes"][strip * rows * 32 + (block * phases + phase) * 512 + lane * 16 + byte]
    if "refinement" not in planes:
        return int(base), 0
    eight, k = divmod(byte, 8)
    start = strip * rows * 16 + block * phases * 256 + lane * phases * 8 + phase * 8
    pair = planes["refinement"][start + 4 * eight + k % 4]
    return int(base), int(pair) >> 4 * (k // 4) & 15


@pytest.mark.parametrize("proj", ["gate_proj", "down_proj"])
@pytest.mark.parametrize("columns", [128, 384, 512, 640, 1024])
@pytest.mark.parametrize("tier", "abcd")
def test_every_code_and_scale_stands_where_the_kernels_look(tier: str, columns: int, proj: str, seed: int) -> None:
    rows = 64
    planes = random_planes(TIERS[tier], proj, rows, columns, torch.Generator().manual_seed(seed))
    base, refinement = unpack(planes, TIERS[tier], proj)
    ordered = kernel_order(planes, TIERS[tier], proj)
    assert {part: plane.shape for part, plane in ordered.items()} == {
        part: (plane.numel(),) for part, plane in planes.items()
    }
    for row in range(rows):
        for code in range(base.shape[1]):
            nibble = 0 if refinement is None else int(refinement[row, code])
            assert _look(ordered, row, code, rows, base.shape[1]) == (int(base[row, code]), nibble)
    assert torch.equal(ordered["scales"].view(-1, rows).t(), unpack_scales(planes["scales"], proj))


def test_a_layer_is_repacked_where_it_lies(seed: int) -> None:
    experts, stored = random_experts(seed), random_experts(seed)
    repack(experts)
    for expert, row in enumerate(stored.layout.slots):
        for proj in PROJECTIONS:
            ordered = kernel_order(stored.planes(expert, proj), row[proj].tier, proj)
            for part, plane in experts.planes(expert, proj).items():
                assert torch.equal(plane.flatten(), ordered[part])


def test_the_table_of_codewords_gives_the_codebooks_back(seed: int) -> None:
    books = random_experts(seed).codebooks
    table = codeword_table({letter: books[letter] for letter in "bd"}, torch.device("cpu"))
    found = codebooks_of(table, "bd")
    assert list(found) == ["b", "d"]
    assert all(torch.equal(found[letter].table(), books[letter].table()) for letter in found)
    assert table.shape == (6336,)
