"""Scalar quantization: the 4-bit spine in GPTQ's layout, and the baselines that vector quantization is compared with.

A grid holds equally spaced levels per row and 128 columns: `offset + step * level`, level 0 .. 2^bits - 1.
- `spine_grid`: levels -8 .. 7 times the step, the only ones GPTQ's symmetric layout can store; step searched.
- `mse_grid`: odd multiples of half a step, so that 1 bit is +-s; step searched. The strongest scalar baseline.
- `minmax_grid`: from the least to the greatest weight, with a zero point to store. The usual baseline.
`compensate` rounds to a grid by the block sweep with single columns (GPTQ with act-order and static groups).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vqserve.encode.assign import factorize, sweep
from vqserve.encode.scales import by_group
from vqserve.format.tiers import GROUP

SPINE_BITS = 4
_ZERO = 8
_QZEROS = 0x77777777
"""Zero point 8 of eight columns; the format stores it less one."""
_STEPS = torch.linspace(0.15, 1.2, 43)
"""Steps tried, as a share of the one that just covers the largest weight."""
_NIBBLES = 8


@dataclass(frozen=True)
class Grid:
    """Levels of every row and group.

    Attributes:
        bits: Of a level.
        step: float32 `[B, R, C/128]`.
        offset: Value of level 0, like `step`.
    """

    bits: int
    step: Tensor
    offset: Tensor

    def levels(self, weight: Tensor) -> Tensor:
        """The nearest level of each weight: float32 `[B, R, C]`, whole numbers."""
        groups = by_group(weight)
        return ((groups - self.offset[..., None]) / self.step[..., None]).round().clamp(0, 2**self.bits - 1).flatten(-2)

    def value(self, levels: Tensor) -> Tensor:
        """Inverse of `levels`."""
        groups = by_group(levels)
        return (self.offset[..., None] + groups * self.step[..., None]).flatten(-2)

    def nearest(self, weight: Tensor) -> Tensor:
        """Each weight rounded to the grid by itself (RTN)."""
        return self.value(self.levels(weight))

    def compensate(self, weight: Tensor, hessian: Tensor) -> Tensor:
        """Weights rounded to the grid so that the output error is small (GPTQ); all float32, `[B, R, C]` and H."""

        def rounding(block: int, target: Tensor, columns: Tensor) -> Tensor:
            group = (columns[:, :1, None] // GROUP).expand(-1, target.shape[1], 1)
            step, offset = self.step.gather(2, group), self.offset.gather(2, group)
            return offset + ((target - offset) / step).round().clamp(0, 2**self.bits - 1) * step

        return sweep(weight, factorize(hessian, 1), rounding)


def minmax_grid(weight: Tensor, bits: int) -> Grid:
    """From the least to the greatest weight of each group."""
    groups = by_group(weight)
    low, high = groups.amin(-1), groups.amax(-1)
    return Grid(bits, _positive((high - low) / (2**bits - 1), torch.float16), low.half().float())


def mse_grid(weight: Tensor, bits: int) -> Grid:
    """Symmetric around 0 without a level at 0, the step with the least squared error; steps are fp16."""
    full = _largest(weight) / max((2**bits - 1) / 2, 1)
    return _search(weight, bits, full, -(2**bits - 1) / 2, None, torch.float16)


def spine_grid(weight: Tensor, importance: Tensor) -> Grid:
    """Levels -8 .. 7, the step with the least squared error weighted by diag H `[B, C]`; steps are bf16."""
    return _search(weight, SPINE_BITS, _largest(weight) / (_ZERO - 1), -_ZERO, importance, torch.bfloat16)


def _search(
    weight: Tensor, bits: int, full: Tensor, first: float, importance: Tensor | None, dtype: torch.dtype
) -> Grid:
    best = Grid(bits, full, first * full)
    least = torch.full_like(full, torch.inf)
    counts = None if importance is None else by_group(importance)[:, None]
    for share in _STEPS.tolist():
        step = _positive(share * full, dtype)
        grid = Grid(bits, step, first * step)
        error = by_group((grid.nearest(weight) - weight).square())
        error = (error if counts is None else error * counts).sum(-1)
        better = error < least
        best = Grid(bits, torch.where(better, step, best.step), torch.where(better, first * step, best.offset))
        least = torch.minimum(least, error)
    return best


def encode_spine(weight: Tensor, hessian: Tensor) -> dict[str, Tensor]:
    """Encodes a linear layer in 4 bit, symmetric, group 128.

    Args:
        weight: float32 `[N, K]`.
        hessian: float32 `[K, K]`.

    Returns:
        `qweight` int32 `[K/8, N]`, eight rows of K to a word, the lowest bits first; `scales` bf16 `[K/128, N]`;
        `qzeros` int32 `[K/128, N/8]`, constant.
    """
    hessian = hessian[None]
    grid = spine_grid(weight[None], hessian.diagonal(dim1=-2, dim2=-1))
    levels = grid.levels(grid.compensate(weight[None], hessian))[0].t().to(torch.int64)
    shifts = 4 * torch.arange(_NIBBLES, device=levels.device)
    words = (levels.unflatten(0, (-1, _NIBBLES)) << shifts[:, None]).sum(1)
    scales = grid.step[0].t().bfloat16().contiguous()
    zeros = torch.full((len(scales), len(weight) // _NIBBLES), _QZEROS, dtype=torch.int32)
    # int32 holds the same 32 bits; values from 2^31 on become negative.
    signed = torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)
    return {"qweight": signed.cpu(), "scales": scales.cpu(), "qzeros": zeros}


def _largest(weight: Tensor) -> Tensor:
    return by_group(weight).abs().amax(-1)


def _positive(step: Tensor, dtype: torch.dtype) -> Tensor:
    """Steps as a dtype can store them, none of them 0; float32."""
    return step.clamp_min(torch.finfo(dtype).tiny).to(dtype).float()
