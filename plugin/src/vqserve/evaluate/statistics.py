"""Intervals and tests that the tables quote."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

Z95 = 1.959963984540054
"""Two-sided 95 % quantile of the normal distribution."""


def wilson(right: int, count: int) -> tuple[float, float]:
    """95 % interval of a share by Wilson's score; (0, 1) if there is nothing to share."""
    if count == 0:
        return 0.0, 1.0
    share, z2 = right / count, Z95**2
    center = (share + z2 / (2 * count)) / (1 + z2 / count)
    half = Z95 / (1 + z2 / count) * math.sqrt(share * (1 - share) / count + z2 / (4 * count**2))
    return max(0.0, center - half), min(1.0, center + half)


def mcnemar(gained: int, lost: int) -> float:
    """Exact two-sided p of McNemar's test: items right in one run only, against items right in the other only."""
    n = gained + lost
    tail = sum(math.comb(n, k) for k in range(min(gained, lost) + 1))
    return float(min(1.0, 2 * tail / 2**n))


def bootstrap(sums: Sequence[float], counts: Sequence[int], *, draws: int = 2000, seed: int = 0) -> tuple[float, float]:
    """95 % interval of sum(sums) / sum(counts) when whole windows are drawn again."""
    generator = torch.Generator().manual_seed(seed)
    picks = torch.randint(len(sums), (draws, len(sums)), generator=generator)
    totals, sizes = torch.tensor(sums, dtype=torch.float64), torch.tensor(counts, dtype=torch.float64)
    means = totals[picks].sum(1) / sizes[picks].sum(1)
    low, high = means.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high
