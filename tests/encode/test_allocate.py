"""Allocation under a byte budget, with an integer-programming solver as oracle."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import block_diag, csr_array

from vqserve.encode.allocate import allocate

Costs = NDArray[np.float64]
Sizes = NDArray[np.int64]


def optimum(costs: Costs, sizes: Sizes, budget: int) -> float:
    """The least possible total cost."""
    items, options = costs.shape
    one_each = LinearConstraint(block_diag([np.ones((1, options))] * items), 1, 1)
    fits = LinearConstraint(csr_array(sizes.reshape(1, -1).astype(float)), -np.inf, budget)
    result = milp(
        costs.ravel(),
        constraints=[one_each, fits],
        integrality=np.ones(costs.size, dtype=np.int64),
        bounds=Bounds(0, 1),
        options={"mip_rel_gap": 0.0},
    )
    assert result.success, result.message
    return float(result.fun)


def total(table: NDArray[np.generic], chosen: NDArray[np.int64]) -> float:
    return float(np.take_along_axis(table, chosen[:, None], 1).sum())


def random_instance(seed: int, items: int, equal: bool) -> tuple[Costs, Sizes]:
    """Costs that mostly fall with size, as rounding errors do, and sizes in the tiers' proportions."""
    random = np.random.default_rng(seed)
    shape = np.array([9, 13, 17, 25])
    weights = np.full(items, 4096) if equal else random.integers(1, 6, items) * 4096
    scale = np.exp(random.normal(0, 2, items))
    costs = scale[:, None] * np.array([0.2, 0.1, 0.06, 0.02]) * np.exp(random.normal(0, 0.3, (items, 4)))
    return costs, weights[:, None] * shape


@pytest.mark.parametrize("equal", [True, False])
@pytest.mark.parametrize("share", [0.05, 0.3, 0.6, 0.95])
def test_allocation_is_as_good_as_the_integer_optimum(share: float, equal: bool, seed: int) -> None:
    costs, sizes = random_instance(seed, 300, equal)
    least, most = int(sizes.min(1).sum()), int(sizes.max(1).sum())
    budget = least + int(share * (most - least))
    chosen = allocate(costs, sizes, budget)
    assert total(sizes, chosen) <= budget
    best, found = optimum(costs, sizes, budget), total(costs, chosen)
    assert best * (1 - 1e-9) <= found <= best * 1.005


def test_budget_is_used_up_to_less_than_the_smallest_upgrade(seed: int) -> None:
    costs, sizes = random_instance(seed, 100, equal=True)
    costs = -np.sort(-costs, axis=1)  # more bytes always help, so leftovers can only be too small to use
    budget = int(sizes.min(1).sum() * 1.7)
    left = budget - total(sizes, allocate(costs, sizes, budget))
    assert 0 <= left < np.diff(sizes, axis=1).min()


def test_everything_fits_or_only_the_smallest_does(seed: int) -> None:
    costs, sizes = random_instance(seed, 50, equal=False)
    assert total(costs, allocate(costs, sizes, int(sizes.max(1).sum()))) == costs.min(1).sum()
    assert (allocate(costs, sizes, int(sizes.min(1).sum())) == 0).all()


def test_an_impossible_budget_is_refused() -> None:
    costs, sizes = random_instance(0, 10, equal=True)
    with pytest.raises(ValueError, match="smallest possible"):
        allocate(costs, sizes, int(sizes.min(1).sum()) - 1)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_cost_that_is_not_finite_never_chooses(value: float) -> None:
    costs, sizes = np.array([[3.0, 1.0], [2.0, value]]), np.array([[1, 2], [1, 2]])
    with pytest.raises(AssertionError, match="NaN and infinity"):
        allocate(costs, sizes, 3)


def test_items_that_cost_nothing_get_no_bytes() -> None:
    costs, sizes = random_instance(1, 40, equal=True)
    costs[7] = 0.0
    assert allocate(costs, sizes, int(sizes.min(1).sum() * 1.5))[7] == 0


def dual_bound(costs: NDArray[np.float64], sizes: NDArray[np.int64], budget: int) -> float:
    """No choice within the budget costs less: the best of the Lagrangian's lower bounds."""
    low, high = 0.0, float(np.ptp(costs) * 10)
    for _ in range(200):
        price = (low + high) / 2
        over = np.take_along_axis(sizes, (costs + price * sizes).argmin(1)[:, None], 1).sum() > budget
        low, high = (price, high) if over else (low, price)
    return float((costs + high * sizes).min(1).sum() - high * budget)


def test_at_a_real_models_size_the_choice_is_as_cheap_as_any_can_be() -> None:
    costs, sizes = random_instance(2, 57_600, equal=True)
    budget = int(sizes.sum() / 4 * 0.9)
    chosen = allocate(costs, sizes, budget)
    assert total(sizes, chosen) <= budget
    bound = dual_bound(costs, sizes, budget)
    assert bound * (1 - 1e-9) <= total(costs, chosen) <= bound * (1 + 1e-4)
