"""The routed experts on a GPU: which kernel takes how many tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from vqserve.kernels.vq_gemm import triton as prefill
from vqserve.kernels.vq_moe import triton as decode
from vqserve.reference.moe import Experts

DECODE_TOKENS = 32
"""Up to so many tokens each pair reads its expert by itself; beyond, pairs are grouped by expert.

One H200, GLM-5.2's layer (hidden 6144, width 2048, top 8 of 256, tiers a/c/d 27/59/14 %), bf16, us by itself / grouped:
2 tokens 472 / 765, 16 tokens 3043 / 4158, 64 tokens 11583 / 9283.
"""


def moe(
    x: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    experts: Experts,
    places: Tensor,
    expert_map: Tensor | None = None,
) -> Tensor:
    """Sum over the routed experts of each token, weighted; what `vqserve.reference.moe` defines.

    Never waits for the device, so it can be captured in a CUDA graph; two calls on the same input give the same bits.

    Args:
        x: bf16, fp16 or fp32 [T, H].
        topk_weights: fp32 [T, k], the router's weights.
        topk_ids: int32 or int64 [T, k], global expert ids; -1 is skipped.
        experts: This rank's experts.
        places: `planes.places(experts.layout, device)`.
        expert_map: Integer [global experts], local id or -1 for an expert on another rank; None if all are local.

    Returns:
        [T, H] in x's dtype: this rank's part of the sum, not reduced over ranks.
    """
    assert x.dtype in decode.TRITON_DTYPES
    x, topk_weights, topk_ids = x.contiguous(), topk_weights.float().contiguous(), topk_ids.contiguous()
    if not topk_ids.numel():
        return torch.zeros_like(x)
    kernel = decode if len(x) <= DECODE_TOKENS else prefill
    out: Tensor = kernel.moe(x, topk_weights, topk_ids, experts, places, expert_map)
    return out
