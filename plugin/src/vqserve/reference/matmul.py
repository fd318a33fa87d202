"""A linear layer on planes: dequantize, then multiply."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from vqserve.reference.dequantize import Codebook, dequantize


def matmul(x: Tensor, planes: Mapping[str, Tensor], codebook: Codebook, proj: str) -> Tensor:
    """`x @ W.T` for x [T, C]: [T, R], computed in fp32 and returned in x's dtype."""
    return (x.float() @ dequantize(planes, codebook, proj).t()).to(x.dtype)
