"""Budget, chosen tiers and model card."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from random_parent import CONFIG
from seeds import FIXED
from vqserve.encode.card import Origin, model_card
from vqserve.encode.plan import Plan, byte_budget, make_plan
from vqserve.format.card import with_scores
from vqserve.format.config import PROJECTIONS, QuantConfig
from vqserve.format.errors import UsageError
from vqserve.format.geometry import Geometry
from vqserve.format.layout import expert_specs
from vqserve.format.tiers import TIERS

GEOMETRY = Geometry.from_dict(CONFIG)
SHAPE = len(GEOMETRY.moe_layers), GEOMETRY.n_routed_experts, len(PROJECTIONS)
ORIGIN = Origin("GLM-test", "mit", "calibration.jsonl", 1000, 900, 48, 2, 3, seed=3, version="0.0")


def random_costs(seed: int) -> NDArray[np.float64]:
    random = np.random.default_rng(seed)
    costs: NDArray[np.float64] = np.exp(random.normal(0, 2, (*SHAPE, 1))) * np.array([0.2, 0.1, 0.06, 0.02])
    return costs


def plan(seed: int, bits: float) -> Plan:
    costs = random_costs(seed)
    return make_plan(GEOMETRY, bits, costs, costs / costs.max(), predictions=900)


@pytest.mark.parametrize("bits", [1.125, 1.9, 2.25, 2.5, 3.0, 3.125])
def test_the_plan_spends_the_budget_and_no_byte_more(bits: float, seed: int) -> None:
    found = plan(seed, bits)
    taken = sum(spec.nbytes for module in found.config.modules for spec in expert_specs(module, GEOMETRY))
    weights = np.prod(SHAPE) * 256 * 256
    assert found.bits == pytest.approx(taken * 8 / weights)
    assert bits - 0.5 / np.prod(SHAPE) < found.bits <= bits, "what is left cannot raise one projection by half a bit"


@FIXED
def test_every_tier_is_reached_when_costs_are_uneven(seed: int) -> None:
    found = plan(seed, 2.0).config
    assert set("".join(letters for module in found.modules for letters in module.tiers.values())) == set(TIERS)
    assert QuantConfig.from_dict(found.to_dict()) == found


@FIXED
def test_costlier_projections_get_no_smaller_a_tier(seed: int) -> None:
    costs = random_costs(seed)
    modules = make_plan(GEOMETRY, 2.25, costs, costs, predictions=900).config.modules
    letters = np.array([[list(module.tiers[proj]) for proj in PROJECTIONS] for module in modules]).transpose(0, 2, 1)
    order = costs[..., 0].ravel().argsort()
    bits = np.array([TIERS[letter].bits for letter in letters.ravel()[order]])
    assert (np.diff(bits) < 0).sum() <= 2, "greedy filling may lift a cheaper one, hardly more"


def test_cost_is_that_of_the_chosen_tiers_per_prediction(seed: int) -> None:
    costs = random_costs(seed)
    found = make_plan(GEOMETRY, 3.125, costs, costs, predictions=900)
    assert found.cost == pytest.approx(costs[..., 3].sum() / 900)
    np.testing.assert_array_equal(found.errors, costs[..., 3])


@pytest.mark.parametrize("bits", [0.9, 1.1249, 3.1251, 8.0, float("nan")])
def test_bits_out_of_reach_are_refused_with_the_reachable_range(bits: float) -> None:
    with pytest.raises(UsageError, match=r"out of reach; choose from 1\.125 to 3\.125 bits"):
        byte_budget(GEOMETRY, bits)


def test_the_card_states_licence_base_model_and_where_the_bits_went(seed: int) -> None:
    found = plan(seed, 2.25)
    config: dict[str, Any] = CONFIG | {"quantization_config": found.config.to_dict()}
    card = model_card(found, ORIGIN, config)
    front = dict(line.split(": ", 1) for line in card.split("---\n")[1].splitlines())
    assert front["license"] == "mit"
    assert front["base_model"] == "GLM-test"
    for module, errors in zip(found.config.modules, found.errors, strict=True):
        for p, proj in enumerate(PROJECTIONS):
            (line,) = [line for line in card.splitlines() if line.startswith(f"| {module.name} | {proj} |")]
            cells = [cell.strip() for cell in line.split("|")[3:-1]]
            assert [int(cell) for cell in cells[:4]] == [module.tiers[proj].count(letter) for letter in TIERS]
            assert float(cells[5]) == pytest.approx(errors[:, p].mean(), abs=1e-4)


def test_the_card_has_a_place_for_scores(seed: int) -> None:
    found = plan(seed, 2.25)
    card = model_card(found, ORIGIN, CONFIG | {"quantization_config": found.config.to_dict()})
    scored = with_scores(card, "| KL | 0.1 |")
    assert "Not measured" in card
    assert "Not measured" not in scored
    assert "| KL | 0.1 |" in scored
