"""AutoBit: which projection of which expert gets which tier, under a budget of bytes.

A multiple-choice knapsack: one tier per projection, least total cost. For a price per byte every projection chooses by
itself; bisection finds the price at which the choices just fit, and what is left over is filled greedily. The result is
within one projection's upgrade of the optimum.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_BISECTIONS = 100


def allocate(costs: NDArray[np.float64], sizes: NDArray[np.int64], budget: int) -> NDArray[np.int64]:
    """Chooses one option per item.

    Args:
        costs: `[items, options]`.
        sizes: Bytes, `[items, options]`.
        budget: Bytes that all chosen options together may take.

    Returns:
        Chosen option of each item, int64 `[items]`.

    Raises:
        ValueError: Even the smallest options do not fit.
    """
    assert np.isfinite(costs).all(), "NaN and infinity would choose without a word"
    smallest = int(sizes.min(1).sum())
    if smallest > budget:
        raise ValueError(f"a budget of {budget} bytes is below the smallest possible, {smallest}")
    low, high = 0.0, _price_bound(costs, sizes)
    chosen = _cheapest(costs, sizes, high)
    if _total(sizes, _cheapest(costs, sizes, low)) <= budget:
        return _cheapest(costs, sizes, low)
    for _ in range(_BISECTIONS):
        price = (low + high) / 2
        found = _cheapest(costs, sizes, price)
        if _total(sizes, found) <= budget:
            high, chosen = price, found
        else:
            low = price
    return _fill(costs, sizes, budget, chosen)


def _cheapest(costs: NDArray[np.float64], sizes: NDArray[np.int64], price: float) -> NDArray[np.int64]:
    """The best option of each item at a price per byte; of equally good ones the smallest."""
    value = costs + price * sizes
    tied = value <= value.min(1, keepdims=True)
    smallest: NDArray[np.int64] = np.where(tied, sizes, np.iinfo(np.int64).max).argmin(1)
    return smallest


def _price_bound(costs: NDArray[np.float64], sizes: NDArray[np.int64]) -> float:
    """A price at which every item takes its smallest option: no saving of cost per byte is larger."""
    gaps = np.diff(np.sort(np.unique(sizes)))
    return 2 * float(np.ptp(costs, axis=1).max()) / float(gaps.min()) + 1.0 if len(gaps) else 1.0


def _total(sizes: NDArray[np.int64], chosen: NDArray[np.int64]) -> int:
    return int(np.take_along_axis(sizes, chosen[:, None], 1).sum())


def _fill(
    costs: NDArray[np.float64], sizes: NDArray[np.int64], budget: int, chosen: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Spends what is left: again and again the change that saves most per byte among those that fit."""
    chosen, left = chosen.copy(), budget - _total(sizes, chosen)
    while True:
        extra = sizes - np.take_along_axis(sizes, chosen[:, None], 1)
        saved = np.take_along_axis(costs, chosen[:, None], 1) - costs
        gain = np.where((extra <= left) & (saved > 0), saved / np.maximum(extra, 1), 0.0)
        item, option = np.unravel_index(int(gain.argmax()), gain.shape)
        if gain[item, option] <= 0:
            return chosen
        left -= int(extra[item, option])
        chosen[item] = option
