"""Routed experts in Triton, for what the kernels in CUDA C++ do not take; also interpreted on a CPU.

Pairs of token and expert are grouped by expert, weights dequantized on the way to tensor cores. How many blocks of
pairs there are only the device knows, so the grid has room for the most there can be. Every block dequantizes its
weights anew. down goes a slice of the hidden size at a time, so that the products kept for the sum over a token's
choices stay below `WORKSPACE`; that sum is taken in the order of the choices.

Products are taken in fp16 with fp32 sums: codewords are fp16 as they are, sums of two are rounded to it, activations
and h are brought into its range by a power of two per row and, for h, per 128 columns. Scales multiply fp32 sums.
Rejected: operands in bf16. Rounding codewords and h to it gave a relative error of 3.8e-3 (one H200, 2026-11-24), where
rounding the result alone gives 1.7e-3.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vqserve.kernels.experts import KernelExperts
from vqserve.kernels.vq_gemm.grouping import Grouping

ROWS = 128
"""Rows of a weight matrix per block: a group of down's columns."""
TOKENS = (16, 32)
"""Pairs per block to choose from: the least that holds an expert's average share."""
WARPS = 8
WORKSPACE = 128 << 20
"""Bytes of products before the sum over a token's choices."""


@triton.jit
def _planes_at(place, codes, refinements, scales):
    """Tier of the matrix whose place is given, and where its codes, refinements and scales begin."""
    return (
        tl.load(place),
        codes + tl.load(place + 1).to(tl.int64) * 64,
        refinements + tl.load(place + 2).to(tl.int64) * 64,
        scales + tl.load(place + 3).to(tl.int64) * 32,
    )


@triton.jit
def _base_of(codebooks, TIER: tl.constexpr):
    """A tier's first 64-bit word in the table of codewords."""
    return codebooks + (512 * (TIER > 0) + 544 * (TIER > 1) + 256 * (TIER > 2))


@triton.jit
def _local_expert(ids, at, expert_map, MAPPED: tl.constexpr):
    """Local number of the expert that the router chose `at`; -1 if there is none on this rank."""
    expert = tl.load(ids + at).to(tl.int32)
    if MAPPED:
        expert = tl.where(expert < 0, -1, tl.load(expert_map + tl.maximum(expert, 0)).to(tl.int32))
    return expert


@triton.jit
def _indices(codes, refinements, code, row, rows, number, REFINED: tl.constexpr):
    """Base and refinement codes of rows and codes that broadcast; those from `number` on are 0.

    Args:
        codes: Pointer to the matrix's codes, uint8.
        refinements: Pointer to its refinements.
        code: Which codes of a row.
        row: Which rows.
        rows: The matrix's rows.
        number: The codes of a row.
        REFINED: Whether the tier has a refinement; if not, the second result is the first.
    """
    strip, lane, block, inside = code // 32, row % 32, row // 32, code < number
    byte = (code - lane) & 15
    half = strip * 32 + 32 > number
    phases = tl.where(half, 1, 2)
    phase = tl.where(half, 0, (code // 16 & 1) ^ (lane // 16))
    at = strip * rows * 32 + (block * phases + phase) * 512 + lane * 16 + byte
    index = tl.load(codes + at, mask=inside, other=0).to(tl.int32)
    if REFINED:
        first = strip * rows * 16 + (block * 32 + lane) * phases * 8 + phase * 8
        pair = tl.load(refinements + first + byte // 8 * 4 + byte % 4, mask=inside, other=0).to(tl.int32)
        return index, (pair >> (byte // 4 % 2 * 4)) & 15
    else:
        return index, index


@triton.jit
def _half_of(word, i: tl.constexpr):
    """The i-th fp16 number of 64-bit words."""
    return (word >> (16 * i)).to(tl.int16).to(tl.float16, bitcast=True)


@triton.jit
def _silu(x):
    """`x * sigmoid(x)` in fp32."""
    return x / (1.0 + tl.exp(-x))


@triton.jit
def _power_of_two(most):
    """Brings numbers of at most `most` below 2^11, near it: a power of two, and its reciprocal."""
    exponent = tl.maximum((most.to(tl.int32, bitcast=True) >> 23) & 255, 11)
    return ((264 - exponent) << 23).to(tl.float32, bitcast=True), ((exponent - 10) << 23).to(tl.float32, bitcast=True)


@triton.jit
def to_half(x, y, factors, columns, BLOCK: tl.constexpr):
    """x[row] = y[row] * factors[row] for a row per program: y in fp16."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    values = tl.load(x + row * columns + at, mask=at < columns, other=0).to(tl.float32)
    scale, factor = _power_of_two(tl.max(tl.abs(values), axis=0))
    tl.store(y + row * columns + at, (values * scale).to(tl.float16), mask=at < columns)
    tl.store(factors + row, factor)


@triton.jit
def _tile(
    x, x_row, factors, codes, refinements, scales, base, row, rows, columns, inside,
    D: tl.constexpr, REFINED: tl.constexpr, FACTORS: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """W x for a block: fp32 [ROWS, TOKENS].

    x points to 64-bit words, x_row [TOKENS] says which of its rows. FACTORS: each 128 columns of a row have their own.
    """
    total = tl.zeros([ROWS, TOKENS], tl.float32)
    for group in range(columns // 128):
        part = tl.zeros([ROWS, TOKENS], tl.float32)
        for step in tl.static_range(8 // D):  # 16 codes at a time: the least that tl.dot takes
            code = group * (128 // D) + step * 16 + tl.arange(0, 16)
            index, nibble = _indices(codes, refinements, code[None, :], row[:, None], rows, columns // D, REFINED)
            for quad in tl.static_range(D // 4):
                word = tl.load(base + index * (D // 4) + quad)
                if REFINED:
                    finer = tl.load(base + 64 * D + nibble * (D // 4) + quad)
                at = x_row[None, :] * (columns // 4) + (code * (D // 4) + quad)[:, None]
                inputs = tl.load(x + at, mask=inside[None, :], other=0)
                for i in tl.static_range(4):
                    weight = _half_of(word, i)
                    if REFINED:
                        weight += _half_of(finer, i)
                    part = tl.dot(weight, _half_of(inputs, i), part)
        part *= tl.load(scales + group * rows + row).to(tl.float32)[:, None]
        if FACTORS:
            part *= tl.load(factors + x_row * (columns // 128) + group, mask=inside, other=0)[None, :]
        total += part
    return total


@triton.jit
def _project(
    x, x_row, factors, place, codes, refinements, scales, codebooks, row, rows, columns, inside,
    FACTORS: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """`_tile` for the matrix whose place is given."""
    tier, codes, refinements, scales = _planes_at(place, codes, refinements, scales)
    if tier == 0:
        tile = _tile(
            x, x_row, factors, codes, refinements, scales, _base_of(codebooks, 0), row, rows, columns, inside,
            8, False, FACTORS, TOKENS, ROWS,
        )  # fmt: skip
    elif tier == 1:
        tile = _tile(
            x, x_row, factors, codes, refinements, scales, _base_of(codebooks, 1), row, rows, columns, inside,
            8, True, FACTORS, TOKENS, ROWS,
        )  # fmt: skip
    elif tier == 2:
        tile = _tile(
            x, x_row, factors, codes, refinements, scales, _base_of(codebooks, 2), row, rows, columns, inside,
            4, False, FACTORS, TOKENS, ROWS,
        )  # fmt: skip
    else:
        tile = _tile(
            x, x_row, factors, codes, refinements, scales, _base_of(codebooks, 3), row, rows, columns, inside,
            4, True, FACTORS, TOKENS, ROWS,
        )  # fmt: skip
    return tile


@triton.jit
def gate_up(
    x, factors, h, h_factors, order, experts, firsts, lasts, places, codes, refinements, scales, codebooks,
    top_k, hidden, width,
    TOKENS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """h[position, rows] * h_factors[position] = _silu(gate x) * up x for a block of positions in the sorted order."""
    expert = tl.load(experts + tl.program_id(1))
    if expert >= 0:
        position = (tl.load(firsts + tl.program_id(1)) + tl.arange(0, TOKENS)).to(tl.int64)
        inside = position < tl.load(lasts + tl.program_id(1))
        token = tl.load(order + position, mask=inside, other=0).to(tl.int64) // top_k
        row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
        place = places + expert * 12
        factor = tl.load(factors + token, mask=inside, other=0)[None, :]
        gate = factor * _project(
            x, token, factors, place, codes, refinements, scales, codebooks, row, width, hidden, inside,
            False, TOKENS, ROWS,
        )  # fmt: skip
        up = factor * _project(
            x, token, factors, place + 4, codes, refinements, scales, codebooks, row, width, hidden, inside,
            False, TOKENS, ROWS,
        )  # fmt: skip
        product = _silu(gate) * up
        scale, factor = _power_of_two(tl.max(tl.abs(product), axis=0))
        at = h + position[None, :] * width + row[:, None]
        tl.store(at, (product * scale[None, :]).to(tl.float16), mask=inside[None, :])
        tl.store(h_factors + position * (width // ROWS) + tl.program_id(0), factor, mask=inside)


@triton.jit
def down(
    h, factors, products, order, experts, firsts, lasts, places, codes, refinements, scales, codebooks,
    first_row, slice_rows, hidden, width,
    TOKENS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """products[pair, rows of the slice] = down h for a block of positions in the sorted order."""
    expert = tl.load(experts + tl.program_id(1))
    if expert >= 0:
        position = (tl.load(firsts + tl.program_id(1)) + tl.arange(0, TOKENS)).to(tl.int64)
        inside = position < tl.load(lasts + tl.program_id(1))
        pair = tl.load(order + position, mask=inside, other=0).to(tl.int64)
        row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
        product = _project(
            h, position, factors, places + expert * 12 + 8, codes, refinements, scales, codebooks,
            first_row + row, hidden, width, inside, True, TOKENS, ROWS,
        )  # fmt: skip
        tl.store(products + pair[None, :] * slice_rows + row[:, None], product, mask=inside[None, :])


@triton.jit
def combine(
    products, out, ids, weights, expert_map, first_row, slice_rows, top_k, hidden,
    MAPPED: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """out[token, rows of the slice] = sum over the token's choices of weight * product, in the order of the choices."""
    token = tl.program_id(0).to(tl.int64)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    total = tl.zeros([ROWS], tl.float32)
    for choice in range(top_k):
        pair = token * top_k + choice
        if _local_expert(ids, pair, expert_map, MAPPED) >= 0:
            total += tl.load(weights + pair) * tl.load(products + pair * slice_rows + row)
    tl.store(out + token * hidden + first_row + row, total)


def moe(
    x: Tensor, topk_weights: Tensor, topk_ids: Tensor, experts: KernelExperts, expert_map: Tensor | None = None
) -> Tensor:
    """As `vqserve.kernels.moe.moe`."""
    (tokens, hidden), top_k, number = x.shape, topk_ids.shape[1], len(experts.places)
    width, pairs = experts.width, tokens * top_k
    block = next((size for size in TOKENS if size * number >= pairs), TOKENS[-1])
    group = Grouping.of(topk_ids, expert_map, number, block)
    codebooks = experts.codebooks.view(torch.int64)
    mapping, mapped = (topk_ids, False) if expert_map is None else (expert_map, True)
    config = {"TOKENS": block, "ROWS": ROWS, "num_warps": WARPS, "num_stages": 1}
    half, factors = _empty(tokens, hidden, x.device), _empty_factors(tokens, x.device)
    to_half[tokens,](x, half, factors, hidden, BLOCK=triton.next_power_of_2(hidden), num_warps=8)
    h, h_factors = _empty(pairs, width, x.device), _empty_factors(pairs * width // ROWS, x.device)
    gate_up_planes, down_planes = experts.planes
    gate_up[width // ROWS, len(group.expert)](
        half.view(torch.int64), factors, h, h_factors, *group.tensors, experts.places, *gate_up_planes, codebooks,
        top_k, hidden, width, **config,
    )  # fmt: skip
    out = torch.empty_like(x)
    slice_rows = min(hidden, max(1, WORKSPACE // (4 * pairs * ROWS)) * ROWS)
    products = torch.empty(pairs * slice_rows, dtype=torch.float32, device=x.device)
    for first in range(0, hidden, slice_rows):
        rows = min(slice_rows, hidden - first)
        down[rows // ROWS, len(group.expert)](
            h.view(torch.int64), h_factors, products, *group.tensors, experts.places, *down_planes, codebooks,
            first, rows, hidden, width, **config,
        )  # fmt: skip
        combine[tokens, rows // ROWS](
            products, out, topk_ids, topk_weights, mapping, first, rows, top_k, hidden,
            MAPPED=mapped, ROWS=ROWS, num_warps=1,
        )  # fmt: skip
    return out


def _empty(rows: int, columns: int, device: torch.device) -> Tensor:
    return torch.empty(rows, columns, dtype=torch.float16, device=device)


def _empty_factors(number: int, device: torch.device) -> Tensor:
    return torch.empty(number, dtype=torch.float32, device=device)
