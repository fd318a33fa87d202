"""Routed experts for many tokens, in Triton: pairs grouped by expert, weights dequantized on the way to tensor cores.

The device sorts the (token, chosen expert) pairs by expert and cuts each expert's into blocks; how many there are only
the device knows, so the grid has room for the most there can be. Every block dequantizes its weights anew. down goes a
slice of the hidden size at a time, so that the products kept for the sum over a token's choices stay below `WORKSPACE`;
that sum is taken in the order of the choices.

Products are taken in tf32, which holds fp16 and bf16 activations and fp16 codewords exactly; an additive tier's sums
and h are rounded to it, scales multiply fp32 sums. Measured on one H200: 18 TFLOP/s at 512 to 4096 tokens, width 2048.
Rejected: operands in bf16. Rounding codewords and h to it gave a relative error of 3.8e-3 (one H200, 2026-11-24), where
rounding the result alone gives 1.7e-3.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from vqserve.format.flat import BUFFERS
from vqserve.kernels.planes import (
    code_offsets,
    codeword_tables,
    half_of,
    input_of,
    local_expert,
    planes_at,
    scale_offsets,
    silu,
    tf32_of,
)
from vqserve.kernels.vq_moe.triton import TRITON_DTYPES
from vqserve.reference.moe import Experts

ROWS = 64
"""Rows of a weight matrix per block; divides every number of rows."""
TOKENS = (16, 32, 64)
"""Pairs per block to choose from: the least that holds an expert's average share."""
WARPS = 4
WORKSPACE = 128 << 20
"""Bytes of products before the sum over a token's choices."""


@triton.jit
def _tile(
    x, x_row, codes, refinements, scales, base, fine, row, rows, columns, inside,
    D: tl.constexpr, REFINED: tl.constexpr, DOWN: tl.constexpr, DTYPE: tl.constexpr,
    TOKENS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """x W^T for a block: fp32 [TOKENS, ROWS]. x points to 64-bit words, x_row [TOKENS] says which of its rows."""
    PER: tl.constexpr = 128 // D
    PER_WORD: tl.constexpr = 64 // DTYPE.primitive_bitwidth
    total = tl.zeros([TOKENS, ROWS], tl.float32)
    for group in range(columns // 128):
        code = group * PER + tl.arange(0, PER)
        at = code_offsets(code[:, None], row[None, :], rows, columns, D, DOWN)
        index = tl.load(codes + at).to(tl.int32)
        if REFINED:
            nibble = (tl.load(refinements + at // 2).to(tl.int32) >> (code[:, None] % 2 * 4)) & 15
        part = tl.zeros([TOKENS, ROWS], tl.float32)
        for quad in tl.static_range(D // 4):
            word = tl.load(base + index * (D // 4) + quad)
            if REFINED:
                finer = tl.load(fine + nibble * (D // 4) + quad)
            at_word = code * (D // PER_WORD) + quad * (4 // PER_WORD)
            from_x = x + x_row[:, None] * (columns // PER_WORD) + at_word[None, :]
            for i in tl.static_range(4):
                if i % PER_WORD == 0:
                    inputs = tl.load(from_x + i // PER_WORD, mask=inside[:, None], other=0)
                weight = half_of(word, i)
                if REFINED:
                    weight = tf32_of(weight + half_of(finer, i))
                part = tl.dot(input_of(inputs, i % PER_WORD, DTYPE), weight, part, input_precision="tf32")
        scale = tl.load(scales + scale_offsets(group, row, rows, columns, DOWN))
        total += part * scale.to(tl.float32)[None, :]
    return total


@triton.jit
def _project(
    x, x_row, place, codes, refinements, scales, base_a, base_b, fine_b, base_c, base_d, fine_d,
    row, rows, columns, inside,
    DOWN: tl.constexpr, DTYPE: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """`_tile` for the matrix whose place is given."""
    tier, codes, refinements, scales = planes_at(place, codes, refinements, scales)
    if tier == 0:
        tile = _tile(
            x, x_row, codes, refinements, scales, base_a, base_a, row, rows, columns, inside,
            8, False, DOWN, DTYPE, TOKENS, ROWS,
        )  # fmt: skip
    elif tier == 1:
        tile = _tile(
            x, x_row, codes, refinements, scales, base_b, fine_b, row, rows, columns, inside,
            8, True, DOWN, DTYPE, TOKENS, ROWS,
        )  # fmt: skip
    elif tier == 2:
        tile = _tile(
            x, x_row, codes, refinements, scales, base_c, base_c, row, rows, columns, inside,
            4, False, DOWN, DTYPE, TOKENS, ROWS,
        )  # fmt: skip
    else:
        tile = _tile(
            x, x_row, codes, refinements, scales, base_d, fine_d, row, rows, columns, inside,
            4, True, DOWN, DTYPE, TOKENS, ROWS,
        )  # fmt: skip
    return tile


@triton.jit
def gate_up(
    x, h, order, starts, block_expert, block_first, places, codes, refinements, scales,
    base_a, base_b, fine_b, base_c, base_d, fine_d, top_k, hidden, width,
    DTYPE: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """h[position, rows] = silu(gate x) * up x for a block of positions in the sorted order."""
    expert = tl.load(block_expert + tl.program_id(1))
    if expert >= 0:
        position = tl.load(block_first + tl.program_id(1)) + tl.arange(0, TOKENS)
        inside = position < tl.load(starts + expert + 1)
        token = tl.load(order + position, mask=inside, other=0) // top_k
        row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
        place = places + expert * 12
        gate = _project(
            x, token, place, codes, refinements, scales, base_a, base_b, fine_b, base_c, base_d, fine_d,
            row, width, hidden, inside, False, DTYPE, TOKENS, ROWS,
        )  # fmt: skip
        up = _project(
            x, token, place + 4, codes, refinements, scales, base_a, base_b, fine_b, base_c, base_d, fine_d,
            row, width, hidden, inside, False, DTYPE, TOKENS, ROWS,
        )  # fmt: skip
        tl.store(h + position[:, None] * width + row[None, :], tf32_of(silu(gate) * up), mask=inside[:, None])


@triton.jit
def down(
    h, products, order, starts, block_expert, block_first, places, codes, refinements, scales,
    base_a, base_b, fine_b, base_c, base_d, fine_d, first_row, slice_rows, hidden, width,
    TOKENS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """products[pair, rows of the slice] = down h for a block of positions in the sorted order."""
    expert = tl.load(block_expert + tl.program_id(1))
    if expert >= 0:
        position = tl.load(block_first + tl.program_id(1)) + tl.arange(0, TOKENS)
        inside = position < tl.load(starts + expert + 1)
        pair = tl.load(order + position, mask=inside, other=0)
        row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
        product = _project(
            h, position, places + expert * 12 + 8, codes, refinements, scales,
            base_a, base_b, fine_b, base_c, base_d, fine_d,
            first_row + row, hidden, width, inside, True, tl.float32, TOKENS, ROWS,
        )  # fmt: skip
        tl.store(products + pair[:, None] * slice_rows + row[None, :], product, mask=inside[:, None])


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
        if local_expert(ids, pair, expert_map, MAPPED) >= 0:
            total += tl.load(weights + pair) * tl.load(products + pair * slice_rows + row)
    tl.store(out + token * hidden + first_row + row, total)


@dataclass(frozen=True)
class Grouping:
    """Pairs sorted by expert and cut into blocks, on the device.

    Attributes:
        order: int64 [pairs], the pair at each position; those without an expert on this rank come last.
        starts: int64 [experts + 1], each expert's first position.
        block_expert: int64 [most blocks], the block's expert; -1 for a block that is not needed.
        block_first: int64 [most blocks], the block's first position.
    """

    order: Tensor
    starts: Tensor
    block_expert: Tensor
    block_first: Tensor

    @classmethod
    def of(cls, topk_ids: Tensor, expert_map: Tensor | None, experts: int, tokens: int) -> Grouping:
        """Groups pairs into blocks of `tokens`; shapes depend on shapes alone, and nothing waits for the device."""
        expert = topk_ids.flatten().long()
        if expert_map is not None:
            expert = torch.where(expert < 0, -1, expert_map.long()[expert.clamp(min=0)])
        ordered, order = torch.where(expert < 0, experts, expert).sort(stable=True)
        numbers = torch.arange(experts + 1, device=expert.device)
        starts = torch.searchsorted(ordered, numbers)
        ends = ((starts.diff() + tokens - 1) // tokens).cumsum(0)  # of each expert's blocks
        most = min(len(order), len(order) // tokens + experts)
        block = torch.arange(most, device=expert.device)
        of_block = torch.searchsorted(ends, block, right=True)
        known = of_block.clamp(max=experts - 1)
        first = starts[known] + (block - torch.where(known > 0, ends[known - 1], 0)) * tokens
        return cls(order, starts, torch.where(of_block < experts, of_block, -1), first)


def moe(
    x: Tensor, topk_weights: Tensor, topk_ids: Tensor, experts: Experts, places: Tensor, expert_map: Tensor | None
) -> Tensor:
    """As `vqserve.kernels.moe.moe`."""
    (tokens, hidden), top_k, number = x.shape, topk_ids.shape[1], len(experts.layout.slots)
    width = experts.layout.slots[0]["down_proj"].columns
    pairs = tokens * top_k
    block = next((size for size in TOKENS if size * number >= pairs), TOKENS[-1])
    group = Grouping.of(topk_ids, expert_map, number, block)
    grouping = (group.order, group.starts, group.block_expert, group.block_first)
    buffers = [experts.buffers[name] for name in BUFFERS]
    tables = codeword_tables(experts.codebooks, places)
    mapping, mapped = (topk_ids, False) if expert_map is None else (expert_map, True)
    config = {"TOKENS": block, "ROWS": ROWS, "num_warps": WARPS}
    h = torch.empty(pairs, width, dtype=torch.float32, device=x.device)
    gate_up[width // ROWS, len(group.block_first)](
        x.view(torch.int64), h, *grouping, places, *buffers[:3], *tables, top_k, hidden, width,
        DTYPE=TRITON_DTYPES[x.dtype], **config,
    )  # fmt: skip
    out = torch.empty_like(x)
    slice_rows = min(hidden, max(1, WORKSPACE // (4 * pairs * 128)) * 128)
    products = torch.empty(pairs * slice_rows, dtype=torch.float32, device=x.device)
    for first in range(0, hidden, slice_rows):
        rows = min(slice_rows, hidden - first)
        down[rows // ROWS, len(group.block_first)](
            h.view(torch.int64),
            products,
            *grouping,
            places,
            *buffers[3:],
            *tables,
            first,
            rows,
            hidden,
            width,
            **config,
        )
        combine[tokens, rows // ROWS](
            products, out, topk_ids, topk_weights, mapping, first, rows, top_k, hidden,
            MAPPED=mapped, ROWS=ROWS, num_warps=1,
        )  # fmt: skip
    return out
