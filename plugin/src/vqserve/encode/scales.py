"""One scale per row and 128 columns: first guess, and the least-squares refit for given codes.

Refitting after the sweep, then sweeping again, is the largest single gain of the encoder at 1 bit: compensation moves
the weights away from what the first scales were made for.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vqserve.format.tiers import GROUP

_RIDGE = 1e-6
"""Pull towards the present scales, relative to the diagonal of the normal equations; only lifts singular rows."""


def by_group(values: Tensor) -> Tensor:
    """Splits the last axis into groups: `[..., C]` to `[..., C/128, 128]`."""
    groups: Tensor = values.unflatten(-1, (-1, GROUP))
    return groups


def initial_scales(weight: Tensor) -> Tensor:
    """Root mean square of every row of 128 columns, rounded to fp16.

    Args:
        weight: float32 `[..., R, C]`.

    Returns:
        float32 holding fp16 values, `[..., R, C/128]`; never 0.
    """
    scales = by_group(weight).square().mean(-1).sqrt()
    return scales.clamp(torch.finfo(torch.float16).tiny, torch.finfo(torch.float16).max).half().float()


def scaled(unit: Tensor, scales: Tensor) -> Tensor:
    """Multiplies codewords `[..., R, C]` by their scales `[..., R, C/128]`."""
    return (by_group(unit) * scales[..., None]).flatten(-2)


def row_errors(weight: Tensor, rounded: Tensor, hessian: Tensor) -> Tensor:
    """(w - q) H (w - q)' of every row, float32 `[B, R]`."""
    error = weight - rounded
    return ((error @ hessian) * error).sum(-1)


def refit(weight: Tensor, unit: Tensor, hessian: Tensor, scales: Tensor) -> Tensor:
    """Scales that minimize the output error of the given codewords: exact normal equations, one system per row.

    Args:
        weight: float32 `[B, R, C]`.
        unit: The chosen codewords, unscaled, float32 `[B, R, C]`.
        hessian: float32 `[B, C, C]`.
        scales: Present scales, float32 `[B, R, C/128]`.

    Returns:
        New scales as float32 holding fp16 values. A row whose error would not fall keeps its present scales: fp16
        rounding or a near-singular system can undo a tiny gain.
    """
    batch, rows, width = weight.shape
    groups = width // GROUP
    normal = torch.empty(batch, rows, groups, groups, dtype=torch.float64, device=weight.device)
    right = torch.empty(batch, rows, groups, dtype=torch.float64, device=weight.device)
    for g in range(groups):  # one group at a time: all at once would hold C/128 copies of the matrix
        here = slice(g * GROUP, (g + 1) * GROUP)
        through = unit[:, :, here] @ hessian[:, here]
        normal[:, :, g] = by_group(through * unit).sum(-1)
        right[:, :, g] = (through * weight).sum(-1)
    diagonal = normal.diagonal(dim1=-2, dim2=-1)
    ridge = (_RIDGE * diagonal).clamp_min(torch.finfo(torch.float64).tiny)
    solved = torch.linalg.solve(normal + torch.diag_embed(ridge), right + ridge * scales)
    found = solved.nan_to_num(posinf=0, neginf=0).clamp(-65504, 65504).half().double()

    def error(s: Tensor) -> Tensor:
        """Row error without its constant part w H w'."""
        return ((normal @ s[..., None]).squeeze(-1) * s - 2 * right * s).sum(-1)

    better = error(found) < error(scales.double())
    return torch.where(better[..., None], found, scales.double()).float()
