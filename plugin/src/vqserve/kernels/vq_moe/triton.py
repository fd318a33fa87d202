"""Routed experts for few tokens, in Triton: runs on any GPU from sm_80 on, and interpreted on a CPU.

Two kernels, no preparation: gate, up and SiLU for every (token, chosen expert) pair, then down summed over a token's
choices. Each pair reads its expert anew. Tiers differ within a launch: a block looks its expert's up. Sums are fp32, in
an order that depends on nothing but the sizes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vqserve.kernels.experts import KernelExperts
from vqserve.kernels.planes import (
    TRITON_DTYPES,
    base_of,
    half_of,
    indices,
    input_of,
    local_expert,
    planes_at,
    silu,
)

ROWS = 8
"""Rows of a weight matrix per block; divides every number of rows."""
GROUPS = 2
"""Groups of 128 columns that a block reads at a time.

One H200, GLM-5.2's layer (hidden 6144, top 8 of 256, tiers a/c/d 27/59/14 %), one bf16 token, CUDA graph, cold L2: us
at width 2048 / 1024 by rows, groups, warps: 8, 2, 4: 215 / 122; 16, 2, 4: 248 / 138; 8, 2, 2: 243 / 135; 8, 4, 4:
268 / 152; 16, 1, 4: 329 / 183; 16, 4, 4: 353 / 199. The bytes alone take 18 / 9 at 4.23 TB/s; the reference takes
47794 / 25581.
"""
WARPS = 4


@triton.jit
def _row_sums(
    x, codes, refinements, scales, base, row, rows, columns,
    D: tl.constexpr, REFINED: tl.constexpr, DTYPE: tl.constexpr, ROWS: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """W x for `ROWS` rows of one matrix: fp32 [ROWS]. x points to 64-bit words."""
    CODES: tl.constexpr = GROUPS * 128 // D
    PER_WORD: tl.constexpr = 64 // DTYPE.primitive_bitwidth
    total = tl.zeros([ROWS, CODES], tl.float32)
    for begin in range(0, columns // D, CODES):
        code = begin + tl.arange(0, CODES)[None, :]
        inside = code < columns // D
        index, nibble = indices(codes, refinements, code, row[:, None], rows, columns // D, REFINED)
        scale = tl.load(scales + code * D // 128 * rows + row[:, None], mask=inside, other=0)
        dot = tl.zeros([ROWS, CODES], tl.float32)
        for quad in tl.static_range(D // 4):
            word = tl.load(base + index * (D // 4) + quad)
            if REFINED:
                finer = tl.load(base + 64 * D + nibble * (D // 4) + quad)
            for i in tl.static_range(4):
                if i % PER_WORD == 0:
                    inputs = tl.load(x + code * (D // PER_WORD) + (quad * 4 + i) // PER_WORD, mask=inside, other=0)
                weight = half_of(word, i).to(tl.float32)
                if REFINED:
                    weight += half_of(finer, i).to(tl.float32)
                dot += weight * input_of(inputs, i % PER_WORD, DTYPE)
        total += dot * scale.to(tl.float32)
    return tl.sum(total, axis=1)


@triton.jit
def _project(
    x, place, codes, refinements, scales, codebooks, row, rows, columns,
    DTYPE: tl.constexpr, ROWS: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """`_row_sums` for the matrix whose place is given."""
    tier, codes, refinements, scales = planes_at(place, codes, refinements, scales)
    if tier == 0:
        base = base_of(codebooks, 0)
        sums = _row_sums(x, codes, refinements, scales, base, row, rows, columns, 8, False, DTYPE, ROWS, GROUPS)
    elif tier == 1:
        base = base_of(codebooks, 1)
        sums = _row_sums(x, codes, refinements, scales, base, row, rows, columns, 8, True, DTYPE, ROWS, GROUPS)
    elif tier == 2:
        base = base_of(codebooks, 2)
        sums = _row_sums(x, codes, refinements, scales, base, row, rows, columns, 4, False, DTYPE, ROWS, GROUPS)
    else:
        base = base_of(codebooks, 3)
        sums = _row_sums(x, codes, refinements, scales, base, row, rows, columns, 4, True, DTYPE, ROWS, GROUPS)
    return sums


@triton.jit
def gate_up(
    x, h, ids, expert_map, places, codes, refinements, scales, codebooks, top_k, hidden, width,
    MAPPED: tl.constexpr, DTYPE: tl.constexpr, ROWS: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """h[pair, rows] = silu(gate x) * up x for pair `program_id(0)`; left unwritten if the pair has no expert here."""
    pair = tl.program_id(0).to(tl.int64)
    expert = local_expert(ids, pair, expert_map, MAPPED)
    if expert >= 0:
        row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
        mine = x + pair // top_k * hidden * DTYPE.primitive_bitwidth // 64
        place = places + expert * 12
        gate = _project(mine, place, codes, refinements, scales, codebooks, row, width, hidden, DTYPE, ROWS, GROUPS)
        up = _project(mine, place + 4, codes, refinements, scales, codebooks, row, width, hidden, DTYPE, ROWS, GROUPS)
        tl.store(h + pair * width + row, silu(gate) * up)


@triton.jit
def down(
    h, out, ids, weights, expert_map, places, codes, refinements, scales, codebooks, top_k, hidden, width,
    MAPPED: tl.constexpr, ROWS: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """out[token, rows] = sum over the token's choices of weight * (down h), in the order of the choices."""
    token = tl.program_id(0).to(tl.int64)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    total = tl.zeros([ROWS], tl.float32)
    for choice in range(top_k):
        pair = token * top_k + choice
        expert = local_expert(ids, pair, expert_map, MAPPED)
        if expert >= 0:
            total += tl.load(weights + pair) * _project(
                h + pair * (width // 2), places + expert * 12 + 8, codes, refinements, scales, codebooks,
                row, hidden, width, tl.float32, ROWS, GROUPS,
            )  # fmt: skip
    tl.store(out + token * hidden + row, total)


def moe(
    x: Tensor, topk_weights: Tensor, topk_ids: Tensor, experts: KernelExperts, expert_map: Tensor | None = None
) -> Tensor:
    """As `vqserve.kernels.moe.moe`, in time proportional to the number of pairs."""
    (tokens, hidden), top_k, width = x.shape, topk_ids.shape[1], experts.width
    mapping, mapped = (topk_ids, False) if expert_map is None else (expert_map, True)
    codebooks = experts.codebooks.view(torch.int64)
    gate_up_planes, down_planes = experts.planes
    h = torch.empty(tokens * top_k, width, dtype=torch.float32, device=x.device)
    out = torch.empty_like(x)
    gate_up[tokens * top_k, width // ROWS](
        x.view(torch.int64), h, topk_ids, mapping, experts.places, *gate_up_planes, codebooks, top_k, hidden, width,
        MAPPED=mapped, DTYPE=TRITON_DTYPES[x.dtype], ROWS=ROWS, GROUPS=GROUPS, num_warps=WARPS,
    )  # fmt: skip
    down[tokens, hidden // ROWS](
        h.view(torch.int64), out, topk_ids, topk_weights, mapping, experts.places, *down_planes, codebooks,
        top_k, hidden, width, MAPPED=mapped, ROWS=ROWS, GROUPS=GROUPS, num_warps=WARPS,
    )  # fmt: skip
    return out
