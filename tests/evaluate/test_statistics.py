from __future__ import annotations

import random

import pytest
from scipy import stats

from vqserve.evaluate.statistics import bootstrap, mcnemar, wilson


def test_wilsons_interval_is_scipys(seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(50):
        count = rng.randint(1, 900)
        right = rng.randint(0, count)
        expected = stats.binomtest(right, count).proportion_ci(0.95, method="wilson")
        assert wilson(right, count) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_an_empty_share_may_be_anything() -> None:
    assert wilson(0, 0) == (0.0, 1.0)


def test_mcnemars_p_is_scipys(seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(50):
        gained, lost = rng.randint(0, 300), rng.randint(1, 300)
        assert mcnemar(gained, lost) == pytest.approx(stats.binomtest(gained, gained + lost, 0.5).pvalue)


def test_one_item_more_is_no_evidence() -> None:
    assert mcnemar(1, 0) == 1.0
    assert mcnemar(0, 0) == 1.0


def test_the_bootstrap_interval_holds_the_mean_of_a_known_distribution(seed: int) -> None:
    rng = random.Random(seed)
    counts = [rng.randint(5, 30) for _ in range(400)]
    values = [sum(rng.expovariate(1.0) for _ in range(count)) for count in counts]
    low, high = bootstrap(values, counts)
    assert low < sum(values) / sum(counts) < high
    assert high - low == pytest.approx(2 * 1.96 / sum(counts) ** 0.5, rel=0.35)
