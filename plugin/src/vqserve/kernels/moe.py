"""The routed experts on a GPU: which kernel takes how many tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from vqserve.kernels.experts import KernelExperts
from vqserve.kernels.vq_gemm import triton as prefill
from vqserve.kernels.vq_moe import cuda as lut
from vqserve.kernels.vq_moe import triton as decode

DECODE_TOKENS = 32
"""Up to so many tokens each pair reads its expert by itself; beyond, pairs are grouped by expert."""


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
    x, topk_weights, topk_ids = x.contiguous(), topk_weights.float().contiguous(), topk_ids.contiguous()
    if not topk_ids.numel():
        return torch.zeros_like(x)
    if x.is_cuda and lut.takes(len(x), topk_ids.shape[1], experts, x.dtype):
        return lut.moe(x, topk_weights, topk_ids, experts, None if expert_map is None else expert_map.int())
    kernel = decode if len(x) <= DECODE_TOKENS else prefill
    out: Tensor = kernel.moe(x, topk_weights, topk_ids, experts, expert_map)
    return out
