"""What our kernels are compared with: torch dequantizing as it goes, and vLLM's own fused experts."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import silu

from vqserve.format.config import PROJECTIONS
from vqserve.format.tiers import GROUP
from vqserve.reference.dequantize import dequantize
from vqserve.reference.moe import Experts

Call = Callable[[Tensor, Tensor, Tensor], Tensor]
"""x [T, H], router's weights [T, k] and ids [T, k] to [T, H]."""


def eager(experts: Experts) -> Call:
    """Dequantize the chosen experts with torch's operators, then multiply."""

    def call(x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for expert in ids.unique().tolist():
            token, choice = (ids == expert).nonzero(as_tuple=True)
            gate, up, down = (
                dequantize(experts.planes(expert, proj), experts.codebooks[slot.tier.id], proj, x.dtype)
                for proj, slot in ((proj, experts.layout.slots[expert][proj]) for proj in PROJECTIONS)
            )
            rows = x[token]
            product = (silu(rows @ gate.t()) * (rows @ up.t())) @ down.t()
            out.index_add_(0, token, product * weights[token, choice, None].to(x.dtype))
        return out

    return call


def fused_bf16(number: int, hidden: int, width: int) -> Call:
    """vLLM's fused experts on bf16 weights, as far as its Triton configuration for this card goes.

    Raises:
        ImportError: vLLM is not installed.
    """
    from vllm.model_executor.layers.fused_moe.fused_moe import fused_experts

    gate_up, down = _normal(number, 2 * width, hidden), _normal(number, hidden, width)
    return lambda x, weights, ids: fused_experts(x, gate_up, down, weights, ids)


def marlin_4_bit(number: int, hidden: int, width: int) -> Call:
    """vLLM's Marlin experts on 4-bit weights, group 128: random words in its layout.

    Raises:
        ImportError: vLLM is not installed.
    """
    from vllm.model_executor.layers.fused_moe.experts.marlin_moe import fused_marlin_moe
    from vllm.scalar_type import scalar_types

    gate_up, down = _words(number, hidden // 16, 4 * width), _words(number, width // 16, 2 * hidden)
    scales = _normal(number, hidden // GROUP, 2 * width), _normal(number, width // GROUP, hidden)
    kind = scalar_types.uint4b8.id
    return lambda x, weights, ids: fused_marlin_moe(x, gate_up, down, None, None, *scales, weights, ids, kind)


def _normal(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.bfloat16, device="cuda").mul_(shape[-1] ** -0.5)


def _words(*shape: int) -> Tensor:
    return torch.randint(-(2**31), 2**31, shape, dtype=torch.int32, device="cuda")
