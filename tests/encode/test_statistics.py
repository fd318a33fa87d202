"""Moments, shrinkage and sensitivity, each against its definition or against autograd."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import silu

from vqserve.encode.statistics import (
    Routing,
    Squares,
    expert_moments,
    pooled_moment,
    shrink,
    squared_derivatives,
)

PER_TOKEN = 7.0
TOKENS, HIDDEN, INNER, EXPERTS, CHOSEN = 60, 12, 10, 5, 2


def random_layer(seed: int) -> tuple[Routing, dict[str, Tensor]]:
    """A routing in which the last expert is never chosen, and the experts' weights."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(TOKENS, EXPERTS - 1, generator=generator)
    chosen = scores.topk(CHOSEN).indices.to(torch.int32)
    inputs = torch.randn(TOKENS, HIDDEN, generator=generator).bfloat16()
    weights = {
        "gate_proj": torch.randn(EXPERTS, INNER, HIDDEN, generator=generator),
        "up_proj": torch.randn(EXPERTS, INNER, HIDDEN, generator=generator),
        "down_proj": torch.randn(EXPERTS, HIDDEN, INNER, generator=generator),
    }
    return Routing(inputs, chosen, torch.rand(TOKENS, CHOSEN, generator=generator) + 0.1), weights


def mean_of(squares: Squares) -> Squares:
    return Squares({proj: rows.mean() for proj, rows in squares.sums.items()}, squares.mass.mean())


def test_moments_are_sums_over_routed_tokens_weighted_by_the_squared_router_weight(seed: int) -> None:
    routing, weights = random_layer(seed)
    outer, inner = expert_moments(routing, range(1, 4), {proj: w[1:4] for proj, w in weights.items()})
    for at, expert in enumerate(range(1, 4)):
        wanted_outer, wanted_inner, count = torch.zeros(HIDDEN, HIDDEN), torch.zeros(INNER, INNER), 0
        for t in range(TOKENS):
            for k in range(CHOSEN):
                if routing.chosen[t, k] == expert:
                    x, w = routing.inputs[t].float(), routing.weights[t, k]
                    h = silu(weights["gate_proj"][expert] @ x) * (weights["up_proj"][expert] @ x)
                    wanted_outer += w**2 * torch.outer(x, x)
                    wanted_inner += w**2 * torch.outer(h, h)
                    count += 1
        torch.testing.assert_close(outer.sums[at], wanted_outer, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(inner.sums[at], wanted_inner, rtol=1e-4, atol=1e-3)
        assert outer.tokens[at] == inner.tokens[at] == count


def test_pooled_moment_is_the_sum_over_all_experts(seed: int) -> None:
    routing, weights = random_layer(seed)
    outer, _ = expert_moments(routing, range(EXPERTS), weights)
    torch.testing.assert_close(pooled_moment(routing, torch.device("cpu")), outer.sums.sum(0), rtol=1e-4, atol=1e-4)


def test_parts_of_the_tokens_add_up_to_the_whole(seed: int) -> None:
    routing, weights = random_layer(seed)
    whole, _ = expert_moments(routing, range(EXPERTS), weights)
    first, _ = expert_moments(routing.part(0, 20), range(EXPERTS), weights)
    rest, _ = expert_moments(routing.part(20, TOKENS), range(EXPERTS), weights)
    both = first + rest
    torch.testing.assert_close(both.sums, whole.sums)
    assert torch.equal(both.tokens, whole.tokens)


@pytest.mark.parametrize("pool", [True, False])
def test_shrinking_keeps_the_trace_and_mixes_by_tokens(pool: bool, seed: int) -> None:
    routing, weights = random_layer(seed)
    moments, _ = expert_moments(routing, range(EXPERTS), weights)
    pooled = pooled_moment(routing, torch.device("cpu")) if pool else None
    shrunk = shrink(moments, 30.0, PER_TOKEN, pooled)
    for at in range(EXPERTS - 1):
        own, n = moments.sums[at], float(moments.tokens[at])
        target = torch.diag(own.diagonal()) if pooled is None else pooled * own.trace() / pooled.trace()
        torch.testing.assert_close(shrunk[at], (n * own + 30 * target) / (n + 30), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(shrunk[at].trace(), own.trace())
    torch.testing.assert_close(shrink(moments, 0.0, PER_TOKEN, pooled)[:-1], moments.sums[:-1])


@pytest.mark.parametrize("pool", [True, False])
def test_an_expert_without_tokens_still_gets_a_usable_hessian(pool: bool, seed: int) -> None:
    routing, weights = random_layer(seed)
    moments, _ = expert_moments(routing, range(EXPERTS), weights)
    shrunk = shrink(moments, 30.0, PER_TOKEN, pooled_moment(routing, torch.device("cpu")) if pool else None)[-1]
    assert moments.tokens[-1] == 0
    torch.testing.assert_close(float(shrunk.trace()), PER_TOKEN / 2)
    assert torch.linalg.eigvalsh(shrunk.double()).min() > -1e-9


def test_sensitivity_is_the_mean_squared_derivative_per_squared_router_weight(seed: int) -> None:
    routing, weights = random_layer(seed)
    gradient = torch.randn(TOKENS, HIDDEN, generator=torch.Generator().manual_seed(seed))
    found = squared_derivatives(routing, gradient, range(EXPERTS), weights)
    squares = {proj: torch.zeros(EXPERTS, weights[proj].shape[1]) for proj in weights}
    mass = torch.zeros(EXPERTS, 1)
    for expert in range(EXPERTS):
        for t, k in (routing.chosen == expert).nonzero().tolist():
            x, w = routing.inputs[t].float(), routing.weights[t, k]
            # An error of a row's output is an addition to it: its derivative is what autograd gives.
            extra = {proj: torch.zeros(weights[proj].shape[1], requires_grad=True) for proj in weights}
            gate = weights["gate_proj"][expert] @ x + extra["gate_proj"]
            up = weights["up_proj"][expert] @ x + extra["up_proj"]
            down = weights["down_proj"][expert] @ (silu(gate) * up) + extra["down_proj"]
            derivatives = torch.autograd.grad(w * down @ gradient[t], list(extra.values()))
            for proj, derivative in zip(extra, derivatives, strict=True):
                squares[proj][expert] += derivative**2
            mass[expert] += w**2
    torch.testing.assert_close(found.mass, mass[:, 0], rtol=1e-4, atol=1e-5)
    for proj, sums in squares.items():
        torch.testing.assert_close(found.sums[proj], sums, rtol=1e-3, atol=1e-3)
    mean = mean_of(found)
    prior = mean.mass / 1000  # a mean expert counts as a thousandth of its tokens
    for proj, rows in found.sensitivities(mean).items():
        wanted = (squares[proj] + prior * mean.sums[proj] / mean.mass) / (mass + prior)
        torch.testing.assert_close(rows, wanted, rtol=1e-3, atol=1e-3)


def test_an_expert_without_tokens_gets_the_mean_sensitivity(seed: int) -> None:
    routing, weights = random_layer(seed)
    gradient = torch.randn(TOKENS, HIDDEN, generator=torch.Generator().manual_seed(seed))
    found = squared_derivatives(routing, gradient, range(EXPERTS), weights)
    for rows in found.sensitivities(mean_of(found)).values():
        assert rows[-1].isfinite().all()
        assert rows[:-1].min() <= rows[-1].mean() <= rows[:-1].max()
