"""Routed experts for any number of tokens on tensor cores, in CUDA C++ (`gather.cu` says how).

One call groups the pairs of token and expert, converts activations to fp16, and runs gate and up, down, and the sum
over a token's choices. down goes a slice of the hidden size at a time, so that the products kept for that sum stay
below `WORKSPACE`. The host never waits, so a call can be captured in a CUDA graph; two calls on the same input give the
same bits.
"""

from __future__ import annotations

from ctypes import c_int, c_int64

import torch
from torch import Tensor

from vqserve.kernels.experts import KernelExperts
from vqserve.kernels.nvrtc import Argument, Kernel, load_kernel
from vqserve.kernels.vq_gemm.grouping import Grouping, most_blocks

DTYPES = (torch.bfloat16, torch.float16)
TOKENS = (8, 16, 32, 64)
"""Pairs per block to choose from."""
SHARES = (4, 8, 48)
"""Up to so many pairs per expert on average the first, second, third of them is fastest on an H200."""
MAX_PAIRS, MAX_EXPERTS = 1024, 512
"""What the sort in one block takes; torch sorts more."""
REPEAT = 4
"""Tiles of rows that a block of `down` takes, so that its codebook is loaded for more than one."""
MAX_BYTES = 1 << 32
"""Of activations in one run of the kernels, which find rows by 32-bit numbers; more tokens take several."""
WORKSPACE = 128 << 20
"""Bytes of products before the sum over a token's choices."""

SOURCE = ("vqserve.kernels.vq_gemm", "gather.cu")
_ROOMY = ((9, 0), (10, 0), (10, 3))
"""Chips with 228 KiB of shared memory per multiprocessor; others have 100 to 164."""


def warps(capability: tuple[int, int]) -> int:
    """Warps per block, each 32 rows: where memory is short, more of them share a codebook."""
    return 4 if capability in _ROOMY else 8


def shared_bytes(tokens: int, warps: int) -> int:
    """Shared memory per block: `Memory` of gather.cu."""
    return 272 * 128 + 4 * warps * tokens + 2 * (272 * tokens + 1600 * warps)


def defines(tokens: int, warps: int) -> tuple[str, ...]:
    """Macros that gather.cu is compiled with."""
    return f"TOKENS={tokens}", f"WARPS={warps}"


def variants(capability: tuple[int, int]) -> list[tuple[str, ...]]:
    """All that are compiled for chips of a compute capability."""
    return [defines(tokens, warps(capability)) for tokens in TOKENS]


def block_tokens(pairs: int, experts: int) -> int:
    """Pairs per block."""
    return TOKENS[sum(pairs > share * experts for share in SHARES)]


def group(topk_ids: Tensor, expert_map: Tensor | None, experts: int, tokens: int) -> Grouping:
    """As `Grouping.of`; where positions and blocks are not needed the content is anything but an expert."""
    pairs, device = topk_ids.numel(), topk_ids.device
    if pairs > MAX_PAIRS or experts > MAX_EXPERTS:
        return Grouping.of(topk_ids, expert_map, experts, tokens)
    blocks = most_blocks(pairs, experts, tokens)
    groups = Grouping(
        *(torch.empty(size, dtype=torch.int32, device=device) for size in (pairs, blocks, blocks, blocks))
    )
    _kernel("group", device, tokens, _warps(device)).launch(
        1,
        MAX_PAIRS,
        [
            topk_ids,
            c_int(topk_ids.dtype == torch.int64),
            expert_map,
            *map(c_int, (pairs, experts, blocks)),
            *groups.tensors,
        ],
    )
    return groups


def load(device: torch.device) -> None:
    """Compiles and loads the kernels."""
    warps = _warps(device)
    for tokens in TOKENS:
        for name in ("group", "to_half", "gate_up", "level", "down", "combine"):
            _kernel(name, device, tokens, warps)


def _warps(device: torch.device) -> int:
    return warps(torch.cuda.get_device_capability(device))


def _kernel(name: str, device: torch.device, tokens: int, warps: int) -> Kernel:
    shared = shared_bytes(tokens, warps) if name in ("gate_up", "down") else 0
    return load_kernel(*SOURCE, name, device.index, shared, defines(tokens, warps))


def moe(
    x: Tensor, topk_weights: Tensor, topk_ids: Tensor, experts: KernelExperts, expert_map: Tensor | None = None
) -> Tensor:
    """Sum over the routed experts of each token, weighted.

    Args:
        x: bf16 or fp16 [T, H]; rows are contiguous.
        topk_weights: fp32 [T, k], the router's weights.
        topk_ids: int32 or int64 [T, k], global expert ids; -1 is skipped.
        experts: This rank's experts.
        expert_map: int32 [global experts], local id or -1 for an expert on another rank; None if all are local.

    Returns:
        [T, H] in x's dtype: this rank's part of the sum, not reduced over ranks.
    """
    (tokens, top_k), hidden, width, number = topk_ids.shape, experts.hidden, experts.width, len(experts.places)
    assert x.dtype in DTYPES
    assert x.shape == (tokens, hidden)
    assert x.stride(1) == 1
    pairs, device = tokens * top_k, x.device
    block = block_tokens(pairs, number)
    if tokens > 1 and 2 * max(tokens * hidden, (pairs + block) * width) > MAX_BYTES:
        cuts = [slice(tokens // 2), slice(tokens // 2, tokens)]
        return torch.cat([moe(x[cut], topk_weights[cut], topk_ids[cut], experts, expert_map) for cut in cuts])
    warps = _warps(device)
    rows = threads = 32 * warps  # of a block
    bf16, ids64 = c_int(x.dtype == torch.bfloat16), c_int(topk_ids.dtype == torch.int64)
    routed: list[Argument] = [topk_ids, ids64, expert_map]

    def kernel(name: str) -> Kernel:
        return _kernel(name, device, block, warps)

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    groups = group(topk_ids, expert_map, number, block)
    blocks, tiles = len(groups.expert), -(-width // rows)
    # In two orders of columns: for codewords of 4 and of 8.
    halves = [empty(tokens, hidden, dtype=torch.float16) for _ in range(2)]
    factors = empty(tokens)
    kernel("to_half").launch(tokens, 256, [x, c_int64(x.stride(0)), bf16, *halves, factors, c_int(hidden)])
    # A block reads all of its positions, also those behind its last one.
    h, h_factors = empty(pairs + block, width, dtype=torch.float16), empty(tiles, pairs + block)
    gate_up, down = ([*planes, experts.places, experts.codebooks] for planes in experts.planes)
    sizes = [c_int(size) for size in (pairs + block, top_k, hidden, width)]
    kernel("gate_up").launch(
        tiles * blocks, threads, [*gate_up, *halves, factors, *groups.tensors, h, h_factors, *sizes]
    )
    h_factor = empty(pairs)
    kernel("level").launch(pairs, 128, [h, h_factors, h_factor, c_int(pairs + block), c_int(width)])
    out = torch.empty(tokens, hidden, dtype=x.dtype, device=device)
    slice_rows = min(hidden, max(1, WORKSPACE // (4 * pairs * rows)) * rows)
    products = empty(pairs, slice_rows)
    for first in range(0, hidden, slice_rows):
        taken = min(slice_rows, hidden - first)
        parts = -(-taken // rows // REPEAT)
        part = [c_int(size) for size in (first, taken, REPEAT, hidden, width)]
        kernel("down").launch(parts * blocks, threads, [*down, h, h_factor, *groups.tensors, products, *part])
        kernel("combine").launch(
            -(-tokens * taken // 4 // 256),
            256,
            [products, *routed, topk_weights, out, bf16, *map(c_int, (tokens, top_k, first, taken, hidden))],
        )
    return out
