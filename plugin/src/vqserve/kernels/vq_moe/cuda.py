"""Routed experts for 1 to 8 tokens by look-up table, in CUDA C++ (`lut.cu` says how).

One call is three kernels: gate and up, then SiLU x up and down, then rounding. Expert ids and weights are read on the
device as the router gives them; the host never waits, so a call can be captured in a CUDA graph. Two calls on the same
input give the same bits. The work grows with the tokens, whether or not they share experts.
"""

from __future__ import annotations

from ctypes import c_int, c_int64
from functools import cache

import torch
from torch import Tensor

from vqserve.kernels.experts import KernelExperts
from vqserve.kernels.nvrtc import Argument, Kernel, load_kernel

MAX_TOKENS = 8
MAX_TOP_K = 16
MAX_EXPERTS = 512
DTYPES = (torch.bfloat16, torch.float16)
THREADS = 512
SHARED = 272 * 64 * 4 + 512 * 4 + 2 * MAX_EXPERTS * 16 + 6 * 4 + 8 + 32 * 20
"""Bytes of shared memory per block: `Memory` of lut.cu."""

SOURCE = ("vqserve.kernels.vq_moe", "lut.cu")


def takes(tokens: int, top_k: int, experts: KernelExperts) -> bool:
    """Whether `moe` takes a call of this shape."""
    return tokens <= MAX_TOKENS and top_k <= MAX_TOP_K and len(experts.places) <= MAX_EXPERTS


def load(device: torch.device) -> None:
    """Compiles and loads the kernels."""
    for name in ("gate_up", "down", "finish"):
        _kernel(name, device)


def _kernel(name: str, device: torch.device) -> Kernel:
    return load_kernel(*SOURCE, name, device.index, 0 if name == "finish" else SHARED)


def moe(
    x: Tensor, topk_weights: Tensor, topk_ids: Tensor, experts: KernelExperts, expert_map: Tensor | None = None
) -> Tensor:
    """Sum over the routed experts of each token, weighted; computed in fp32.

    Calls on one device share their sums: they must follow each other, on one stream or in one graph.

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
    hidden, width, number = experts.hidden, experts.width, len(experts.places)
    assert takes(tokens, top_k, experts)
    assert x.dtype in DTYPES
    assert x.shape == (tokens, hidden)
    assert x.stride(1) == 1
    assert topk_weights.dtype == torch.float32
    assert topk_ids.dtype in (torch.int32, torch.int64)
    assert topk_weights.is_contiguous()
    assert topk_ids.is_contiguous()
    assert expert_map is None or expert_map.dtype == torch.int32
    out = torch.empty(tokens, hidden, dtype=x.dtype, device=x.device)
    if tokens == 0:
        return out
    bf16, ids64 = c_int(x.dtype == torch.bfloat16), c_int(topk_ids.dtype == torch.int64)
    sizes = [c_int(size) for size in (tokens, top_k, hidden, width)]
    gu, sums, flags = _accumulators(x.device, hidden, width)
    weights: list[list[Argument]] = [[*planes, experts.places, experts.codebooks] for planes in experts.planes]
    routed: list[Argument] = [topk_ids, ids64, expert_map]
    resident = _resident_blocks(x.device) * tokens
    _kernel("gate_up", x.device).launch(
        max(resident, tokens * (2 * -(-hidden // 256) + 2 * -(-hidden // 512))),  # a block per table at least
        THREADS,
        [*weights[0], x, c_int64(x.stride(0)), bf16, *routed, *sizes, c_int(number), gu, flags],
    )
    _kernel("down", x.device).launch(
        max(resident, tokens * top_k * -(-width // 256)),
        THREADS,
        [*weights[1], *routed, topk_weights, *sizes, c_int(number), gu, sums, flags],
    )
    _kernel("finish", x.device).launch(
        -(-max(tokens * hidden // 2, tokens * top_k * width) // 256),
        256,
        [gu, sums, flags, out, bf16, *sizes],
    )
    return out


def _resident_blocks(device: torch.device) -> int:
    """Blocks that run at once: per multiprocessor two, which registers allow, or one if shared memory has no room."""
    properties = torch.cuda.get_device_properties(device)
    return properties.multi_processor_count * min(2, properties.shared_memory_per_multiprocessor // (SHARED + 1024))


@cache
def _accumulators(device: torch.device, hidden: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """Zero between calls: int64 sums of gate and up of every pair, of outputs, and int32 flags per token."""
    pairs = MAX_TOKENS * MAX_TOP_K
    return (
        torch.zeros(2 * pairs * width, dtype=torch.int64, device=device),
        torch.zeros(MAX_TOKENS * hidden, dtype=torch.int64, device=device),
        torch.zeros(2 * MAX_TOKENS, dtype=torch.int32, device=device),
    )
