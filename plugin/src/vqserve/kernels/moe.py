"""The routed experts on a GPU: which kernel takes how many tokens.

| tokens | activations | kernel |
|---|---|---|
| 1 to 8 | bf16, fp16 | `vq_moe.cuda`: look-up tables |
| more | bf16, fp16 | `vq_gemm.cuda`: codewords gathered for tensor cores |
| any | fp32 | `vq_gemm.triton` |

One H200, one rank of two of GLM-5.2's layer (hidden 6144, width 1024, top 8 of 256, tiers a/c/d 27/59/14 %), bf16,
CUDA graph, cold L2, us (docs/bench/h200-kernels.json): by tables 1 token 27, 4 tokens 97, 8 tokens 212; gathered 16
tokens 409, 64 tokens 764. Tables cost the same for every token, gathering ever less.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vqserve.kernels.experts import KernelExperts
from vqserve.kernels.nvrtc import arch_of, compile_source
from vqserve.kernels.vq_gemm import cuda as gather
from vqserve.kernels.vq_gemm import triton as portable
from vqserve.kernels.vq_moe import cuda as lut


def compile_all(device: torch.device) -> None:
    """Compiles and loads the kernels for half-precision activations, before a request has to wait for it.

    Raises:
        UsageError: NVRTC is missing or its results cannot be kept.
    """
    lut.load(device)
    gather.load(device)


def compile_ahead(capability: tuple[int, int]) -> list[bytes]:
    """Compiles what `compile_all` loads on chips of a compute capability, without a GPU; the cubins.

    Raises:
        UsageError: As `compile_all`.
    """
    variants = [(lut.SOURCE, ()), *((gather.SOURCE, defines) for defines in gather.variants(capability))]
    return [compile_source(*source, arch_of(capability), defines) for source, defines in variants]


def moe(
    x: Tensor, topk_weights: Tensor, topk_ids: Tensor, experts: KernelExperts, expert_map: Tensor | None = None
) -> Tensor:
    """Sum over the routed experts of each token, weighted; what `vqserve.reference.moe` defines.

    Never waits for the device, so it can be captured in a CUDA graph; two calls on the same input give the same bits.

    Args:
        x: bf16, fp16 or fp32 [T, H].
        topk_weights: fp32 [T, k], the router's weights.
        topk_ids: int32 or int64 [T, k], global expert ids; -1 is skipped.
        experts: This rank's experts.
        expert_map: Integer [global experts], local id or -1 for an expert on another rank; None if all are local.

    Returns:
        [T, H] in x's dtype: this rank's part of the sum, not reduced over ranks.
    """
    if not topk_ids.numel():
        return torch.zeros_like(x)
    local = None if expert_map is None else expert_map.int()
    routed = (x.contiguous(), topk_weights.float().contiguous(), topk_ids.contiguous())
    if not x.is_cuda or x.dtype not in gather.DTYPES:
        return portable.moe(*routed, experts, local)
    if lut.takes(len(x), topk_ids.shape[1], experts):
        return lut.moe(*routed, experts, local)
    return gather.moe(*routed, experts, local)
