"""One batch of experts: the chosen shrinkage, and planes and figures that belong together."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from seeds import FIXED
from vqserve.encode.batch import STRENGTHS, Problem, encode_experts, held_out_losses
from vqserve.encode.codebook import fit_codebooks, normalized_vectors
from vqserve.encode.statistics import Moments
from vqserve.format.config import PROJECTIONS
from vqserve.format.tiers import TIERS
from vqserve.reference.dequantize import Codebook, dequantize

EXPERTS, HIDDEN, INNER = 2, 256, 128
SHAPES = {"gate_proj": (INNER, HIDDEN), "up_proj": (INNER, HIDDEN), "down_proj": (HIDDEN, INNER)}


def random_codebooks(generator: torch.Generator) -> dict[str, Codebook]:
    sample, found = torch.randn(1, 64, 256, generator=generator), {}
    for d in (4, 8):
        vectors, counts = normalized_vectors(sample, torch.ones(1, 256), d)
        found.update(fit_codebooks(vectors[0], counts[0], generator))
    return found


def moments(tokens: int, mixing: Tensor, generator: torch.Generator) -> Moments:
    inputs = torch.randn(EXPERTS, tokens, len(mixing), generator=generator) @ mixing
    return Moments(inputs.mT @ inputs, torch.full((EXPERTS,), float(tokens)))


def strength(losses: Tensor) -> float:
    """The best of `STRENGTHS`, in tokens."""
    return STRENGTHS[int(losses.argmin())] * INNER


@FIXED
def test_shrinkage_is_strong_towards_a_true_pool_and_weak_towards_a_false_one(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    mixing, other = torch.randn(2, INNER, INNER, generator=generator)
    other *= torch.logspace(-1.5, 1.5, INNER)
    weight = torch.randn(EXPERTS, 64, INNER, generator=generator)
    test, codebook = moments(5000, mixing, generator), random_codebooks(generator)["c"]
    few, enough = moments(INNER // 2, mixing, generator), moments(8 * INNER, mixing, generator)
    true, false = (moments(50_000, mix, generator).sums.sum(0) for mix in (mixing, other))
    assert strength(held_out_losses(weight, few, test, codebook, true)[0]) >= 2 * INNER
    assert strength(held_out_losses(weight, few, test, codebook, None)[0]) > 0, "fewer tokens than columns"
    assert strength(held_out_losses(weight, enough, test, codebook, false)[0]) <= INNER / 2


@pytest.mark.parametrize("unseen", [[], [0], [1], [0, 1]])
def test_experts_without_held_out_tokens_have_no_say_in_the_strength(unseen: list[int], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(INNER, INNER, generator=generator)
    weight = torch.randn(EXPERTS, 64, INNER, generator=generator)
    enough, test = moments(8 * INNER, mixing, generator), moments(5000, mixing, generator)
    test.sums[unseen], test.tokens[unseen] = 0, 0
    losses, seen = held_out_losses(weight, enough, test, random_codebooks(generator)["c"], None)
    assert seen == EXPERTS - len(unseen)
    assert losses.isfinite().all()
    assert (losses > 0).all() == (seen > 0)


def test_a_pruned_expert_costs_nothing_in_any_tier(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    weights = {proj: torch.zeros(1, *shape) for proj, shape in SHAPES.items()}
    inputs = moments(900, torch.eye(HIDDEN), generator).sums[:1]
    hessians = {"gate_proj": inputs, "up_proj": inputs, "down_proj": torch.zeros(1, INNER, INNER)}
    sensitivities = {proj: torch.ones(1, rows) for proj, (rows, _) in SHAPES.items()}
    found = encode_experts(Problem(weights, hessians, sensitivities, torch.ones(1)), random_codebooks(generator))
    assert not found["costs"].any()
    assert not found["errors"].any()
    assert found["zeros"].tolist() == [3]


def test_planes_dequantize_to_the_errors_and_costs_that_are_reported(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    weights = {proj: torch.randn(EXPERTS, *shape, generator=generator) for proj, shape in SHAPES.items()}
    hessians = {
        proj: moments(900, torch.randn(width, width, generator=generator), generator).sums
        for proj, (_, width) in SHAPES.items()
    }
    sensitivities = {proj: torch.rand(EXPERTS, rows, generator=generator) for proj, (rows, _) in SHAPES.items()}
    codebooks = random_codebooks(generator)
    found = encode_experts(Problem(weights, hessians, sensitivities, torch.ones(EXPERTS)), codebooks)
    for at in range(EXPERTS):
        for p, proj in enumerate(PROJECTIONS):
            for t, letter in enumerate(TIERS):
                stem = f"{at}.{proj}.{letter}."
                planes = {name.removeprefix(stem): plane for name, plane in found.items() if name.startswith(stem)}
                weight, hessian = weights[proj][at].double(), hessians[proj][at].double()
                error = weight - dequantize(planes, codebooks[letter], proj).double()
                rows = ((error @ hessian) * error).sum(1)
                energy = ((weight @ hessian) * weight).sum()
                torch.testing.assert_close(found["errors"][at, p, t], rows.sum() / energy, rtol=1e-3, atol=0)
                cost = (sensitivities[proj][at].double() * rows).sum() / 2
                torch.testing.assert_close(found["costs"][at, p, t], cost, rtol=1e-3, atol=0)
            errors = found["errors"][at, p]
            assert (errors.diff() < 0).all(), "more bits, less error"
