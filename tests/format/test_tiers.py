from __future__ import annotations

import pytest

from vqserve.format.tiers import TIERS, Tier


def test_the_four_tiers_cost_what_the_format_says() -> None:
    assert {letter: tier.bits for letter, tier in TIERS.items()} == {"a": 1.0, "b": 1.5, "c": 2.0, "d": 3.0}
    assert {letter: tier.effective_bits for letter, tier in TIERS.items()} == {
        "a": 1.125,
        "b": 1.625,
        "c": 2.125,
        "d": 3.125,
    }


@pytest.mark.parametrize("tier", TIERS.values(), ids=TIERS)
def test_the_bytes_of_a_projection_are_its_effective_bits(tier: Tier) -> None:
    rows, columns = 2048, 6144
    assert tier.weight_bytes(rows, columns) * 8 == rows * columns * tier.effective_bits
    assert (tier.code_bytes(columns) + tier.refinement_bytes(columns)) * 8 == columns * tier.bits


def test_a_refinement_makes_up_the_bits_that_base_codes_leave() -> None:
    for tier in TIERS.values():
        assert tier.bits == (8 + (4 if tier.refinement_rows else 0)) / tier.d
