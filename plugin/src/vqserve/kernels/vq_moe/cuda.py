"""Routed experts for 1 to 8 tokens by look-up table, in CUDA C++ (`lut.cu` says how).

One call is three kernels: gate and up, then SiLU x up and down, then rounding. Expert ids and weights are read on the
device as the router gives them; the host never waits, so a call can be captured in a CUDA graph. Two calls on the same
input give the same bits. The work grows with the tokens, whether or not they share experts.
"""

from __future__ import annotations

from collections.abc import Mapping
from ctypes import c_int, c_int64
from dataclasses import dataclass

import torch
from torch import Tensor

from vqserve.format.config import PROJECTIONS
from vqserve.format.tiers import TIERS
from vqserve.kernels.nvrtc import Argument, load_kernel
from vqserve.kernels.repack.records import matrix_bytes, pack_records
from vqserve.reference.dequantize import Codebook
from vqserve.reference.moe import Experts

MAX_TOKENS = 8
MAX_TOP_K = 16
MAX_EXPERTS = 512
THREADS = 512
SHARED = 272 * 64 * 4 + 512 * 4 + 2 * MAX_EXPERTS * 4 + 6 * 4 + 64 * 4
"""Bytes of shared memory per block: `Memory` of lut.cu."""

_SOURCE = ("vqserve.kernels.vq_moe", "lut.cu")
_UNIT = 64
"""Bytes that a matrix's place is a multiple of; every record's size is."""


@dataclass(frozen=True)
class LutExperts:
    """The experts of one layer that live on this rank, in the kernel's order, and room for its sums.

    Attributes:
        weights: uint8, the experts' gate, up and down matrices in records, one after the other.
        where: int32 [experts, 3], per matrix `place / 64 << 2 | tier`.
        codebooks: fp16 [6336], tiers a to d, each base before its refinement; zeros for tiers that do not occur.
        hidden: Inputs and outputs of an expert.
        width: Rows of gate and up on this rank.
        sums: int64, zero between calls: gate and up of every pair of token and expert, then outputs.
        flags: int32 [16], zero between calls.
    """

    weights: Tensor
    where: Tensor
    codebooks: Tensor
    hidden: int
    width: int
    sums: Tensor
    flags: Tensor


def prepare(experts: Experts) -> LutExperts:
    """Repacks the experts of one layer, a matrix at a time, on the device that holds them."""
    layout = experts.layout
    hidden, width = layout.slots[0]["down_proj"].rows, layout.slots[0]["down_proj"].columns
    assert width % 32 == 0, "the format's groups see to it"
    assert len(layout.slots) <= MAX_EXPERTS
    device = experts.buffers["gate_up_codes"].device
    where, size = torch.empty(len(layout.slots), 3, dtype=torch.int64), 0
    for expert, row in enumerate(layout.slots):
        for at, proj in enumerate(PROJECTIONS):
            slot = row[proj]
            where[expert, at] = size // _UNIT << 2 | "abcd".index(slot.tier.id)
            size += matrix_bytes(slot.tier, slot.rows, slot.columns)
    assert size // _UNIT < 1 << 29, "places fit into int32"
    weights, begin = torch.empty(size, dtype=torch.uint8, device=device), 0
    for expert, row in enumerate(layout.slots):
        for proj in PROJECTIONS:
            records = pack_records(experts.planes(expert, proj), row[proj].tier, proj)
            weights[begin : begin + len(records)] = records
            begin += len(records)
    return LutExperts(
        weights,
        where.int().to(device),
        _all_codebooks(experts.codebooks, device),
        hidden,
        width,
        torch.zeros(MAX_TOKENS * (2 * MAX_TOP_K * width + hidden), dtype=torch.int64, device=device),
        torch.zeros(2 * MAX_TOKENS, dtype=torch.int32, device=device),
    )


def moe(
    x: Tensor, topk_weights: Tensor, topk_ids: Tensor, experts: LutExperts, expert_map: Tensor | None = None
) -> Tensor:
    """Sum over the routed experts of each token, weighted; computed in fp32.

    Args:
        x: bf16 or fp16 [T, H], T from 0 to 8; rows are contiguous.
        topk_weights: fp32 [T, k], the router's weights.
        topk_ids: int32 or int64 [T, k], global expert ids, k at most 16; -1 is skipped.
        experts: This rank's experts.
        expert_map: int32 [global experts], local id or -1 for an expert on another rank; None if all are local.

    Returns:
        [T, H] in x's dtype: this rank's part of the sum, not reduced over ranks. A token some of whose sums are not
        below 2^20 in magnitude is NaN.
    """
    tokens, top_k = topk_ids.shape
    hidden, width, number = experts.hidden, experts.width, len(experts.where)
    assert x.shape == (tokens, hidden)
    assert x.stride(1) == 1
    assert x.dtype in (torch.bfloat16, torch.float16)
    assert tokens <= MAX_TOKENS
    assert top_k <= MAX_TOP_K
    assert topk_weights.dtype == torch.float32
    assert topk_ids.dtype in (torch.int32, torch.int64)
    assert topk_weights.is_contiguous()
    assert topk_ids.is_contiguous()
    assert expert_map is None or expert_map.dtype == torch.int32
    out = torch.empty(tokens, hidden, dtype=x.dtype, device=x.device)
    if tokens == 0:
        return out
    device = x.device.index
    bf16, ids64 = c_int(x.dtype == torch.bfloat16), c_int(topk_ids.dtype == torch.int64)
    sizes = [c_int(size) for size in (tokens, top_k, hidden, width)]
    gu, sums = experts.sums[: 2 * tokens * top_k * width], experts.sums[-MAX_TOKENS * hidden :]
    tables: list[Argument] = [experts.weights, experts.where, experts.codebooks]
    routed: list[Argument] = [topk_ids, ids64, expert_map]
    resident = _resident_blocks(device) * tokens
    load_kernel(*_SOURCE, "gate_up", device, SHARED).launch(
        max(resident, tokens * (2 * -(-hidden // 256) + 2 * -(-hidden // 512))),  # a block per table at least
        THREADS,
        [*tables, x, c_int64(x.stride(0)), bf16, *routed, *sizes, c_int(number), gu, experts.flags],
    )
    load_kernel(*_SOURCE, "down", device, SHARED).launch(
        max(resident, tokens * top_k * -(-width // 256)),
        THREADS,
        [*tables, *routed, topk_weights, *sizes, c_int(number), gu, sums, experts.flags],
    )
    load_kernel(*_SOURCE, "finish", device).launch(
        -(-max(tokens * hidden // 2, tokens * top_k * width) // 256),
        256,
        [gu, sums, experts.flags, out, bf16, *sizes],
    )
    return out


def _resident_blocks(device: int) -> int:
    """Blocks that run at once: per multiprocessor two, which registers allow, or one if shared memory has no room."""
    properties = torch.cuda.get_device_properties(device)
    return properties.multi_processor_count * min(2, properties.shared_memory_per_multiprocessor // (SHARED + 1024))


def _all_codebooks(codebooks: Mapping[str, Codebook], device: torch.device) -> Tensor:
    parts = []
    for letter, tier in TIERS.items():
        size, book = (tier.base_rows + tier.refinement_rows) * tier.d, codebooks.get(letter)
        if book is None:
            parts.append(torch.zeros(size, dtype=torch.float16, device=device))
        else:
            parts += [table.flatten().to(device) for table in (book.base, book.refinement) if table is not None]
    return torch.cat(parts)
