"""Codebooks: weighted symmetric k-means of normalized weights, and the additive codebooks of the 1.5- and 3-bit tiers.

Normalized weights have no preferred sign, so every codebook is made of pairs c, -c. Only one of each pair is fitted, on
vectors folded onto its side: half the work, and the symmetry is exact. Each vector counts by its columns' mean diag H.

An additive codebook is a base of 256 and a refinement of 16 rows: k-means, k-means of the residual, then alternating
least squares over both, each vector assigned to the best of all 4096 sums.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vqserve.encode.assign import choose
from vqserve.encode.scales import by_group, initial_scales
from vqserve.format.tiers import BASE_ROWS, TIERS, Tier
from vqserve.reference.dequantize import Codebook

ITERATIONS = 25
JOINT_ITERATIONS = 20
"""Relative weight error at 3 bit of a toy: 0.0322 after 5, 0.0311 after 10, 0.0304 after 20, 0.0297 after 40."""
JOINT_VECTORS = 2**18
"""Vectors for the joint fit: 61 for each of the 4096 sums, which only 272 codewords determine."""
_CHUNK = 2**14


def normalized_vectors(weight: Tensor, importance: Tensor, d: int) -> tuple[Tensor, Tensor]:
    """Cuts normalized weights into vectors of d columns.

    Args:
        weight: float32 `[B, R, C]`.
        importance: diag H, float32 `[B, C]`.
        d: Columns per vector.

    Returns:
        Vectors float32 `[B, R * C/d, d]`, and how much each counts, float32 `[B, R * C/d]`, mean 1 per matrix.
    """
    unit = (by_group(weight) / initial_scales(weight)[..., None]).flatten(-2)
    vectors = unit.unflatten(-1, (-1, d))
    counts = importance.unflatten(-1, (-1, d)).mean(-1)
    counts = counts / counts.mean(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    return vectors.flatten(1, 2), counts[:, None].expand(vectors.shape[:-1]).flatten(1)


def fit_codebooks(vectors: Tensor, counts: Tensor, generator: torch.Generator) -> dict[str, Codebook]:
    """Fits the codebooks of all tiers with a d.

    Args:
        vectors: float32 `[N, d]`, N >= 256, in random order.
        counts: Weight of each vector, float32 `[N]`.
        generator: Source of the first guesses, on the CPU.

    Returns:
        By tier: fp16 codebooks on the CPU; rows k and k + half are opposite.
    """
    base = _pairs(symmetric_kmeans(vectors, counts, BASE_ROWS // 2, generator))
    tiers = [tier for tier in TIERS.values() if tier.d == vectors.shape[1]]
    return {tier.id: _codebook(tier, base, vectors, counts, generator) for tier in tiers}


def _codebook(tier: Tier, base: Tensor, vectors: Tensor, counts: Tensor, generator: torch.Generator) -> Codebook:
    """The codebook of a tier, given the k-means codewords of its d."""
    if not tier.refinement_rows:
        return Codebook(tier, base.half().cpu())
    vectors, counts = vectors[:JOINT_VECTORS], counts[:JOINT_VECTORS]
    residual = vectors - base[nearest(vectors, base)[0]]
    refinement = _pairs(symmetric_kmeans(residual, counts, tier.refinement_rows // 2, generator))
    for _ in range(JOINT_ITERATIONS):
        i, j = nearest(vectors, base, refinement)
        assert j is not None
        base = _pairs(_folded_means(vectors - refinement[j], counts, i, base))
        refinement = _pairs(_folded_means(vectors - base[i], counts, j, refinement))
    return Codebook(tier, base.half().cpu(), refinement.half().cpu())


def symmetric_kmeans(vectors: Tensor, counts: Tensor, pairs: int, generator: torch.Generator) -> Tensor:
    """One of each pair of opposite codewords, float32 `[pairs, d]`; arguments as for `fit_codebooks`."""
    start = torch.randperm(len(vectors), generator=generator)[:pairs]
    half = vectors[start.to(vectors.device)]
    for _ in range(ITERATIONS):
        full = _pairs(half)
        half = _folded_means(vectors, counts, nearest(vectors, full)[0], full)
    return half


def nearest(vectors: Tensor, base: Tensor, refinement: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """Rows of the nearest codeword (or sum of two) of every vector: int64 `[N]`, and `[N]` or None."""
    identity = torch.eye(vectors.shape[1], dtype=vectors.dtype, device=vectors.device)[None]
    found = [choose(part[None], identity, base, refinement) for part in vectors.split(_CHUNK)]
    i = torch.cat([base_row[0] for base_row, _ in found])
    return i, None if refinement is None else torch.cat([row[0] for _, row in found if row is not None])


def _pairs(half: Tensor) -> Tensor:
    return torch.cat([half, -half])


def _folded_means(values: Tensor, counts: Tensor, rows: Tensor, full: Tensor) -> Tensor:
    """Weighted mean of the values of each pair, those of the second row turned around; a pair without any stays."""
    pairs = len(full) // 2
    sign = torch.where(rows < pairs, counts, -counts)
    total = torch.zeros_like(full[:pairs]).index_add_(0, rows % pairs, values * sign[:, None])
    mass = torch.zeros_like(full[:pairs, 0]).index_add_(0, rows % pairs, counts)
    return torch.where(mass[:, None] > 0, total / mass[:, None], full[:pairs])
