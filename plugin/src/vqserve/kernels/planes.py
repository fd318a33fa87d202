"""What the Triton kernels share: where planes lie, and codewords and activations unpacked from 64-bit words.

A code is looked up as one or two 64-bit words of four fp16 weights each. The planes are read where the checkpoint's
order puts them: column group by column group, code c of row r at `r * row_stride + group * group_stride + c % (128/d)`.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import triton
import triton.language as tl
from torch import Tensor

from vqserve.format.config import PROJECTIONS
from vqserve.format.flat import FlatLayout
from vqserve.format.tiers import TIERS
from vqserve.reference.dequantize import Codebook

ENTRY = 4
"""Numbers per projection in a table of places: tier (index of `TIERS`), first code, refinement byte and scale."""


def places(layout: FlatLayout, device: torch.device) -> Tensor:
    """The table of places: int64 [experts, gate | up | down, `ENTRY`] on `device`."""
    letters = list(TIERS)
    rows = [
        [
            [letters.index(slot.tier.id), slot.codes, slot.refinement if slot.tier.refinement_rows else 0, slot.scales]
            for slot in (row[proj] for proj in PROJECTIONS)
        ]
        for row in layout.slots
    ]
    return torch.tensor(rows, dtype=torch.int64).to(device)


def codeword_tables(codebooks: Mapping[str, Codebook], unused: Tensor) -> list[Tensor]:
    """The codebooks as 64-bit words: base and refinement of tier a, b, c, d in turn, those there are in any layer.

    Args:
        codebooks: Tier id to codebook of the tiers that a layer uses.
        unused: What stands for a tier that it does not use; never read.
    """
    tables = []
    for letter, tier in TIERS.items():
        book = codebooks.get(letter)
        tables.append(unused if book is None else book.base.view(torch.int64))
        if tier.refinement_rows:
            tables.append(unused if book is None or book.refinement is None else book.refinement.view(torch.int64))
    return tables


@triton.jit
def planes_at(place, codes, refinements, scales):
    """Tier of the matrix whose place is given, and where its codes, refinements and scales begin."""
    return (
        tl.load(place),
        codes + tl.load(place + 1),
        refinements + tl.load(place + 2),
        scales + tl.load(place + 3),
    )


@triton.jit
def local_expert(ids, at, expert_map, MAPPED: tl.constexpr):
    """Local number of the expert that the router chose `at`; -1 if there is none on this rank."""
    expert = tl.load(ids + at).to(tl.int32)
    if MAPPED:
        expert = tl.where(expert < 0, -1, tl.load(expert_map + tl.maximum(expert, 0)).to(tl.int32))
    return expert


@triton.jit
def code_offsets(code, row, rows, columns, D: tl.constexpr, DOWN: tl.constexpr):
    """Offset of codes in their plane; refinements lie at half of it."""
    PER: tl.constexpr = 128 // D
    if DOWN:
        return (code // PER * rows + row) * PER + code % PER
    else:
        return row * (columns // D) + code


@triton.jit
def scale_offsets(group, row, rows, columns, DOWN: tl.constexpr):
    """Offset of the scales of a group of 128 columns."""
    if DOWN:
        return group * rows + row
    else:
        return row * (columns // 128) + group


@triton.jit
def half_of(word, i: tl.constexpr):
    """The i-th fp16 number of 64-bit words, as fp32."""
    return (word >> (16 * i)).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def input_of(word, i: tl.constexpr, DTYPE: tl.constexpr):
    """The i-th number of 64-bit words that hold two fp32, or four fp16 or bf16 numbers; as fp32."""
    if DTYPE.primitive_bitwidth == 32:
        return (word >> (32 * i)).to(tl.int32).to(tl.float32, bitcast=True)
    elif DTYPE.is_bf16():
        return ((word >> (16 * i)).to(tl.int32) << 16).to(tl.float32, bitcast=True)
    else:
        return half_of(word, i)


@triton.jit
def tf32_of(x):
    """fp32 numbers rounded to tf32, ties to even. Tensor cores only cut the surplus bits off: a bias."""
    bits = x.to(tl.int32, bitcast=True)
    return ((bits + 0xFFF + ((bits >> 13) & 1)) & -0x2000).to(tl.float32, bitcast=True)


@triton.jit
def silu(x):
    """`x * sigmoid(x)` in fp32."""
    return x / (1.0 + tl.exp(-x))
