"""One batch of experts: the chosen shrinkage, and planes and figures that belong together."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from vqserve.encode.codebook import fit_codebooks, normalized_vectors
from vqserve.encode.experts import Problem, choose_strength, encode_experts
from vqserve.encode.statistics import Moments, shrink
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


def test_shrinkage_is_strong_towards_a_true_pool_and_weak_towards_a_false_one(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    mixing, other = torch.randn(2, INNER, INNER, generator=generator)
    other *= torch.logspace(-1.5, 1.5, INNER)
    weight = torch.randn(EXPERTS, 64, INNER, generator=generator)
    test, codebook = moments(5000, mixing, generator), random_codebooks(generator)["c"]
    few, enough = moments(INNER // 2, mixing, generator), moments(8 * INNER, mixing, generator)
    true, false = (moments(50_000, mix, generator).sums.sum(0) for mix in (mixing, other))
    assert choose_strength(weight, few, test, codebook, true).min() >= 2 * INNER
    assert choose_strength(weight, few, test, codebook, None).min() > 0, "fewer tokens than columns"
    assert choose_strength(weight, enough, test, codebook, false).max() <= INNER / 2


@pytest.mark.parametrize("unseen", [[0], [1], [0, 1]])
def test_an_expert_without_held_out_tokens_takes_the_strongest_shrinkage(unseen: list[int], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    mixing, other = torch.randn(2, INNER, INNER, generator=generator)
    other *= torch.logspace(-1.5, 1.5, INNER)
    weight = torch.randn(EXPERTS, 64, INNER, generator=generator)
    enough, test = moments(8 * INNER, mixing, generator), moments(5000, mixing, generator)
    test.sums[unseen], test.tokens[unseen] = 0, 0
    false = moments(50_000, other, generator).sums.sum(0)
    found = choose_strength(weight, enough, test, random_codebooks(generator)["c"], false)
    for expert in range(EXPERTS):
        assert found[expert] == 8 * INNER if expert in unseen else found[expert] <= INNER / 2
    # Each expert's H is shrunk by its own strength.
    each = torch.stack([shrink(enough, float(found[expert]), false)[expert] for expert in range(EXPERTS)])
    assert torch.equal(shrink(enough, found, false), each)


def test_a_pruned_expert_costs_nothing_in_any_tier(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    weights = {proj: torch.zeros(1, *shape) for proj, shape in SHAPES.items()}
    inputs = moments(900, torch.eye(HIDDEN), generator).sums[:1]
    hessians = {"gate_proj": inputs, "up_proj": inputs, "down_proj": torch.zeros(1, INNER, INNER)}
    sensitivities = {proj: torch.ones(1, rows) for proj, (rows, _) in SHAPES.items()}
    found = encode_experts(Problem(weights, hessians, sensitivities), random_codebooks(generator))
    assert not found["costs"].any()
    assert not found["errors"].any()


def test_planes_dequantize_to_the_errors_and_costs_that_are_reported(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    weights = {proj: torch.randn(EXPERTS, *shape, generator=generator) for proj, shape in SHAPES.items()}
    hessians = {
        proj: moments(900, torch.randn(width, width, generator=generator), generator).sums
        for proj, (_, width) in SHAPES.items()
    }
    sensitivities = {proj: torch.rand(EXPERTS, rows, generator=generator) for proj, (rows, _) in SHAPES.items()}
    codebooks = random_codebooks(generator)
    found = encode_experts(Problem(weights, hessians, sensitivities), codebooks)
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
