"""Planes and codebooks to weights.

`W[r, c] = (float(base[i][c % d]) + float(refinement[j][c % d])) * float(scale[r, c // 128])`, each operation in fp32,
rounded once; only then cast. A sum of two fp16 numbers can be inexact in fp32, so the order is part of the definition.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from vqserve.format.tiers import GROUP, Tier
from vqserve.reference.pack import unpack, unpack_scales


@dataclass(frozen=True)
class Codebook:
    """The codewords of one tier.

    Attributes:
        tier: Whose codewords they are.
        base: fp16 [256, d].
        refinement: fp16 [16, d]; None for a tier without refinement.
    """

    tier: Tier
    base: Tensor
    refinement: Tensor | None = None

    def table(self) -> Tensor:
        """Every sum a code stands for: fp32 [256, d], or [4096, d] with row `16 * i + j` for base i, refinement j."""
        if self.refinement is None:
            return self.base.float()
        return (self.base.float()[:, None] + self.refinement.float()).flatten(0, 1)


def dequantize(
    planes: Mapping[str, Tensor], codebook: Codebook, proj: str, dtype: torch.dtype = torch.float32
) -> Tensor:
    """The weights [R, C] of one projection.

    Args:
        planes: `codes`, `scales` and, if the tier has one, `refinement`, in the stored layout.
        codebook: The codewords of the projection's tier.
        proj: gate_proj, up_proj or down_proj; decides the layout.
        dtype: What the fp32 values are rounded to.
    """
    codes, refinement = unpack(planes, codebook.tier, proj)
    rows = codes if refinement is None else 16 * codes + refinement
    words = codebook.table()[rows].view(len(rows), -1, GROUP)  # [R, C/128, 128]
    scales = unpack_scales(planes["scales"], proj).float()
    return (words * scales[:, :, None]).flatten(1).to(dtype)
