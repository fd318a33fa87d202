"""Block sweep: rounds a weight matrix block by block and lets later blocks make up for the errors of earlier ones.

The aim is min tr((W - Q) H (W - Q)'), H = E[x x'] of the inputs. With H = V V', V upper triangular, the error is a sum
over blocks b of d columns, ||(t_b - q_b) V_bb||^2, where the target t_b = w_b + carried_b V_bb^-1 depends on earlier
choices only: carried_b is the sum over earlier blocks a of (w_a - q_a) V_ab. This is GPTQ's recursion (H^-1 = U'U has
U = V^-1) without an inverse of H.

Where this departs from published encoders, and why:
- The codeword is chosen in the metric of V_bb, not the Euclidean one: columns matter unequally, and correlate.
- Weights are divided by their scale when the choice is made, not once per 128 columns before compensation moves them.
- The whole V_bb takes part, not its diagonal, and V is the factor of the *permuted* H (permuting a factor is wrong).
- Blocks are visited by falling sum of diag H. A codeword is d adjacent columns, so whole blocks move and no permutation
  has to be stored.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from vqserve.format.tiers import GROUP
from vqserve.reference.dequantize import Codebook

DAMP = 0.01
"""Share of mean(diag H) added to the diagonal before factoring. 0.01, 0.03 and 0.05 give the demo the same KL at 2 bit,
within 4 %."""
PANEL = 128
"""Columns between two full-width updates; a smaller update inside keeps the working set in cache."""
_JOINT_SCORES = {"cpu": 2**20, "cuda": 2**28}
"""Scores that the joint look-up holds at once: the L2 cache of one core, about 1 GiB of a GPU."""


@dataclass(frozen=True)
class Factor:
    """A factored, block-permuted H.

    Attributes:
        columns: Original column at each position of the visit order, int64 `[B, C]`.
        upper: V with permuted, damped H = V V', float32 `[B, C, C]`, upper triangular.
        diagonal: Blocks V_bb, float32 `[B, C/d, d, d]`.
        inverse: Their inverses.
    """

    columns: Tensor
    upper: Tensor
    diagonal: Tensor
    inverse: Tensor

    @property
    def d(self) -> int:
        """Columns per block."""
        return self.diagonal.shape[-1]


def factorize(hessian: Tensor, d: int, *, order: bool = True, damp: float = DAMP) -> Factor:
    """Permutes, damps and factors H.

    Args:
        hessian: float32 `[B, C, C]`, symmetric positive semidefinite.
        d: Columns per block; divides C.
        order: Visit blocks by falling sum of diag H; otherwise from left to right.
        damp: Share of mean(diag H) added to the diagonal.
    """
    batch, width, _ = hessian.shape
    weight = hessian.diagonal(dim1=-2, dim2=-1)
    blocks = torch.arange(width // d, device=hessian.device).expand(batch, -1)
    if order:
        blocks = weight.unflatten(-1, (-1, d)).sum(-1).argsort(dim=-1, descending=True, stable=True)
    columns = (blocks[..., None] * d + torch.arange(d, device=hessian.device)).flatten(1)
    permuted = torch.stack([h[c][:, c] for h, c in zip(hessian.double(), columns, strict=True)])
    ridge = (damp * weight.double().mean(-1)).clamp_min(torch.finfo(torch.float32).tiny)
    permuted += torch.diag_embed(ridge[:, None].expand(batch, width))
    # A lower factor of the matrix turned by 180 degrees is an upper factor of the matrix itself.
    upper = torch.linalg.cholesky(permuted.flip(-1, -2)).flip(-1, -2)
    diagonal = torch.stack([upper[:, at : at + d, at : at + d] for at in range(0, width, d)], dim=1)
    inverse = torch.linalg.solve_triangular(diagonal, torch.eye(d, dtype=upper.dtype, device=upper.device), upper=True)
    return Factor(columns, upper.float(), diagonal.float().contiguous(), inverse.float().contiguous())


class Rounding(Protocol):
    """Rounds one block of every row."""

    def __call__(self, block: int, target: Tensor, columns: Tensor) -> Tensor:
        """Rounds `target` `[B, R, d]`, the block at place `block` of the order, original columns int64 `[B, d]`."""


def sweep(weight: Tensor, factor: Factor, rounding: Rounding) -> Tensor:
    """Rounds all blocks in the factor's order, all rows at once.

    Args:
        weight: float32 `[B, R, C]`.
        factor: Of the `B` matrices H.
        rounding: Called once per block, in order.

    Returns:
        The rounded weight, float32 `[B, R, C]`, in the original order of columns.
    """
    d, width = factor.d, weight.shape[-1]
    index = factor.columns[:, None].expand_as(weight)
    weight = weight.gather(2, index)
    error = torch.zeros_like(weight)
    carried = torch.zeros_like(weight)  # (sum over earlier blocks a of (w_a - q_a) V_ab) for every b
    for start in range(0, width, PANEL):
        end = min(start + PANEL, width)
        for at in range(start, end, d):
            here = slice(at, at + d)
            target = weight[:, :, here] + carried[:, :, here] @ factor.inverse[:, at // d]
            error[:, :, here] = weight[:, :, here] - rounding(at // d, target, factor.columns[:, here])
            carried[:, :, at + d : end] += error[:, :, here] @ factor.upper[:, here, at + d : end]
        carried[:, :, end:] += error[:, :, start:end] @ factor.upper[:, start:end, end:]
    return torch.empty_like(weight).scatter_(2, index, weight - error)


class Lookup:
    """Rounds blocks to scaled codewords and keeps the codes.

    Attributes:
        codes: Chosen rows of the codebook's base, int64 `[B, R, C/d]`, in the original order of columns.
        refinement: Chosen rows of its refinement, like `codes`; None for a tier without one.

    Args:
        codebook: Of the tier.
        scales: float32 `[B, R, C/128]`.
        factor: Whose order the sweep follows.
        euclidean: Choose the nearest codeword instead of the one with the least output error (ablation).
    """

    def __init__(self, codebook: Codebook, scales: Tensor, factor: Factor, *, euclidean: bool = False) -> None:
        batch, rows, groups = scales.shape
        self._rows = codebook.base.to(scales)
        self._extra = None if codebook.refinement is None else codebook.refinement.to(scales)
        self._scales = scales
        blocks = factor.diagonal
        self._gram = torch.eye(factor.d).to(blocks).expand_as(blocks) if euclidean else blocks @ blocks.mT
        shape = (batch, rows, groups * GROUP // factor.d)
        self.codes = torch.zeros(shape, dtype=torch.int64, device=scales.device)
        self.refinement = None if self._extra is None else torch.zeros_like(self.codes)

    def __call__(self, block: int, target: Tensor, columns: Tensor) -> Tensor:
        """Rounds one block; see `Rounding`."""
        rows, d = target.shape[1:]
        scale = self._scales.gather(2, (columns[:, :1, None] // GROUP).expand(-1, rows, 1))
        place = (columns[:, :1, None] // d).expand(-1, rows, 1)
        wanted = target / torch.where(scale == 0, 1, scale)
        codes, refinement = choose(wanted, self._gram[:, block], self._rows, self._extra)
        self.codes.scatter_(2, place, codes[..., None])
        value = self._rows[codes]
        if self.refinement is not None and refinement is not None and self._extra is not None:
            self.refinement.scatter_(2, place, refinement[..., None])
            value = value + self._extra[refinement]
        return value * scale


def choose(wanted: Tensor, gram: Tensor, rows: Tensor, extra: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Rows i (and j) minimizing (x - a_i - b_j) G (x - a_i - b_j)' for every x; exact over all pairs.

    Args:
        wanted: x, float32 `[B, R, d]`.
        gram: G, float32 `[B, d, d]`.
        rows: a, float32 `[256, d]`.
        extra: b, float32 `[16, d]`, or None.
    """
    base_gram = rows @ gram
    base_score = torch.baddbmm((base_gram * rows).sum(-1)[:, None], wanted, base_gram.mT, alpha=-2)
    if extra is None:
        return base_score.argmin(-1), None
    extra_gram = extra @ gram
    extra_score = torch.baddbmm((extra_gram * extra).sum(-1)[:, None], wanted, extra_gram.mT, alpha=-2)
    cross = 2 * extra_gram @ rows.mT  # [B, 16, 256]
    step = max(1, _JOINT_SCORES[wanted.device.type] // (len(wanted) * cross[0].numel()))
    # min over i of (s_i + min over j of (t_j + x_ij)) takes one broadcast sum instead of a product with 4096 codewords.
    chosen = torch.cat(
        [
            (scores + (others[..., None] + cross[:, None]).amin(2)).argmin(-1)
            for scores, others in zip(base_score.split(step, 1), extra_score.split(step, 1), strict=True)
        ],
        dim=1,
    )
    given = cross.mT.gather(1, chosen[..., None].expand(-1, -1, len(extra)))
    return chosen, (extra_score + given).argmin(-1)
