"""The spine's 4-bit weights, in GPTQ's layout.

`W[n, k] = (q[k, n] - 8) * scales[k // 128, n]`, q being nibble `k % 8` (lowest first) of `qweight[k // 8, n]`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vqserve.format.tiers import GROUP


def dequantize_gptq(qweight: Tensor, scales: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """The weights [N, K] of one module.

    Args:
        qweight: int32 [K/8, N].
        scales: bf16 or fp16 [K/128, N].
        dtype: What the fp32 values are rounded to.
    """
    shifts = torch.arange(0, 32, 4, device=qweight.device, dtype=torch.int32)
    levels = (qweight[:, None] >> shifts[:, None]).bitwise_and(15).flatten(0, 1) - 8
    return (levels.float() * scales.float().repeat_interleave(GROUP, 0)).t().contiguous().to(dtype)
