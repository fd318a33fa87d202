"""What our kernels are compared with: torch dequantizing as it goes, vLLM's own fused experts, and AQLM's kernels."""

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


def aqlm_2_bit(number: int, hidden: int, width: int) -> Call:
    """AQLM's kernels for vectors, two codebooks of 256 codewords of 8 weights: 2 bits, as tier c. Ids on the host.

    AQLM has no experts: every choice is two products of its own, one with gate and up, which lie in one matrix.

    Raises:
        ImportError: The package aqlm is not installed, or does not compile its kernels: that takes nvcc and ninja.
        RuntimeError: A product is not the sum of its codewords.
    """
    try:
        from aqlm.inference_kernels import cuda_kernel  # noqa: F401 # compiles and registers the operators
    except (OSError, RuntimeError) as cause:
        raise ImportError(f"AQLM's kernels do not compile: {cause}") from cause

    product = torch.ops.aqlm.code2x8_matmat
    books = _normal(2, 256, 1, 8)
    gate_up, down = _bytes(number, 2 * width, hidden // 8, 2), _bytes(number, hidden, width // 8, 2)
    ones = torch.ones(max(2 * width, hidden), 1, 1, 1, dtype=torch.bfloat16, device="cuda")

    def multiply(x: Tensor, codes: Tensor) -> Tensor:
        out: Tensor = product(x, codes, books, ones[: len(codes)], None)
        return out

    def call(x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for token, chosen in enumerate(ids.tolist()):
            for choice, expert in enumerate(chosen):
                gate, up = multiply(x[token : token + 1], gate_up[expert]).chunk(2, dim=1)
                out[token] += weights[token, choice] * multiply(silu(gate) * up, down[expert])[0]
        return out

    x, codes = _normal(1, hidden), gate_up[0].long() & 255
    plain = (books[0, codes[..., 0], 0] + books[1, codes[..., 1], 0]).flatten(1).double()
    expected = x.double() @ plain.t()
    if not (error := float((multiply(x, gate_up[0]) - expected).norm() / expected.norm())) < 1e-2:
        raise RuntimeError(f"AQLM's product: relative error {error:.2g}, not reported")
    return call


def _normal(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.bfloat16, device="cuda").mul_(shape[-1] ** -0.5)


def _words(*shape: int) -> Tensor:
    return torch.randint(-(2**31), 2**31, shape, dtype=torch.int32, device="cuda")


def _bytes(*shape: int) -> Tensor:
    return torch.randint(-128, 128, shape, dtype=torch.int8, device="cuda")
