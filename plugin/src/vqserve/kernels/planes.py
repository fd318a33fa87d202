"""What the Triton kernels share: where planes lie, and codewords and activations unpacked from 64-bit words.

A code is looked up as one or two 64-bit words of four fp16 weights each. The planes are in the order of
`kernels.repack.order`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

TRITON_DTYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


@triton.jit
def planes_at(place, codes, refinements, scales):
    """Tier of the matrix whose place is given, and where its codes, refinements and scales begin."""
    return (
        tl.load(place),
        codes + tl.load(place + 1).to(tl.int64) * 64,
        refinements + tl.load(place + 2).to(tl.int64) * 64,
        scales + tl.load(place + 3).to(tl.int64) * 32,
    )


@triton.jit
def base_of(codebooks, TIER: tl.constexpr):
    """A tier's first 64-bit word in the table of codewords."""
    return codebooks + (512 * (TIER > 0) + 544 * (TIER > 1) + 256 * (TIER > 2))


@triton.jit
def local_expert(ids, at, expert_map, MAPPED: tl.constexpr):
    """Local number of the expert that the router chose `at`; -1 if there is none on this rank."""
    expert = tl.load(ids + at).to(tl.int32)
    if MAPPED:
        expert = tl.where(expert < 0, -1, tl.load(expert_map + tl.maximum(expert, 0)).to(tl.int32))
    return expert


@triton.jit
def indices(codes, refinements, code, row, rows, number, REFINED: tl.constexpr):
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
def half_of(word, i: tl.constexpr):
    """The i-th fp16 number of 64-bit words."""
    return (word >> (16 * i)).to(tl.int16).to(tl.float16, bitcast=True)


@triton.jit
def input_of(word, i: tl.constexpr, DTYPE: tl.constexpr):
    """The i-th number of 64-bit words that hold two fp32, or four fp16 or bf16 numbers; as fp32."""
    if DTYPE.primitive_bitwidth == 32:
        return (word >> (32 * i)).to(tl.int32).to(tl.float32, bitcast=True)
    elif DTYPE.is_bf16():
        return ((word >> (16 * i)).to(tl.int32) << 16).to(tl.float32, bitcast=True)
    else:
        return half_of(word, i).to(tl.float32)


@triton.jit
def silu(x):
    """`x * sigmoid(x)` in fp32."""
    return x / (1.0 + tl.exp(-x))
