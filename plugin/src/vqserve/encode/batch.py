"""Encodes a few experts of one layer in every tier: statistics, shrinkage, codes, and what each choice costs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vqserve.encode.assign import factorize
from vqserve.encode.parent import Parent
from vqserve.encode.statistics import (
    Moments,
    Routing,
    Squares,
    expert_moments,
    pooled_moment,
    shrink,
    squared_derivatives,
)
from vqserve.encode.vq import Encoded, encode_matrices
from vqserve.format.config import PROJECTIONS
from vqserve.format.tiers import TIERS
from vqserve.reference.dequantize import Codebook
from vqserve.reference.pack import pack, pack_scales

STRENGTHS = (0.0, 0.125, 0.5, 2.0, 8.0)
"""Shrinkage strengths tried, in multiples of the number of columns."""
SAMPLED = 16
"""Experts of a layer that its prior is learned from."""
_HELD_OUT = 8
"""One token in so many is held out to choose the strength."""
PROBE = "c"
"""Tier that the strengths are compared in."""


@dataclass(frozen=True)
class Prior:
    """What is taken of a whole layer, and so does not depend on which experts are encoded together.

    Attributes:
        pooled: Sum over all experts of the moments of the inputs of gate and up, float32 `[C, C]`.
        strengths: Shrinkage of the inputs of gate and up, and of down, in tokens, float64 `[2]`.
        traces: Trace that a token adds to either's moments, float64 `[2]`.
        mean: Squared derivatives of a mean expert; `[]` each.
    """

    pooled: Tensor
    strengths: Tensor
    traces: Tensor
    mean: Squares

    def to_tensors(self) -> dict[str, Tensor]:
        """To be saved."""
        parts = {"pooled": self.pooled, "strengths": self.strengths, "traces": self.traces, "mass": self.mean.mass}
        return {name: part.cpu() for name, part in {**parts, **self.mean.sums}.items()}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], device: torch.device) -> Prior:
        """From what `to_tensors` made."""
        mean = Squares({proj: tensors[proj].to(device) for proj in PROJECTIONS}, tensors["mass"].to(device))
        return cls(tensors["pooled"].to(device), tensors["strengths"], tensors["traces"], mean)


@dataclass(frozen=True)
class Problem:
    """What to encode, and in which metric.

    Attributes:
        weights: By projection, float32 `[B, R, C]`.
        hessians: By projection, float32 `[B, C, C]`; gate and up share theirs.
        sensitivities: By projection, float32 `[B, R]`.
        tokens: Calibration tokens of each expert, float32 `[B]`.
    """

    weights: Mapping[str, Tensor]
    hessians: Mapping[str, Tensor]
    sensitivities: Mapping[str, Tensor]
    tokens: Tensor


def learn_prior(
    parent: Parent,
    layer: int,
    routing: Routing,
    gradient: Tensor,
    codebook: Codebook,
    device: torch.device,
    at_once: int,
) -> Prior:
    """What a layer has in common, from `SAMPLED` of its experts, evenly from the busiest to the idlest.

    Strengths are those with the least mean relative output error on held-out tokens; the strongest, if none of the
    sampled experts has any.

    Args:
        parent: Whose experts.
        layer: Their layer.
        routing: Of all calibration tokens.
        gradient: With respect to the layer's outputs, `[T', C]` for the leading T' tokens.
        codebook: Of tier `PROBE`, to compare strengths in.
        device: To compute on.
        at_once: Experts whose moments fit into memory together.
    """
    held_out = len(routing) // _HELD_OUT
    test, fit = routing.part(0, held_out), routing.part(held_out, len(routing))
    pooled = pooled_moment(fit, device)
    losses, seen = torch.zeros(2, len(STRENGTHS), dtype=torch.float64), torch.zeros(2)
    traces, tokens = torch.zeros(2, dtype=torch.float64), 0.0
    squares: list[Squares] = []
    sampled = _spread(routing, parent.geometry.n_routed_experts)
    for start in range(0, len(sampled), at_once):
        chosen = sampled[start : start + at_once]
        weights = parent.expert_weights(layer, chosen, device)
        held, fitted = expert_moments(test, chosen, weights), expert_moments(fit, chosen, weights)
        for side, (proj, pool) in enumerate((("gate_proj", pooled), ("down_proj", None))):
            found, count = held_out_losses(weights[proj], fitted[side], held[side], codebook, pool)
            losses[side] += found
            seen[side] += count
            traces[side] += float((fitted[side].traces + held[side].traces).sum())
        tokens += float((fitted[0].tokens + held[0].tokens).sum())
        squares.append(squared_derivatives(routing.part(0, len(gradient)), gradient, chosen, weights))
    best = [int(losses[side].argmin()) if seen[side] else len(STRENGTHS) - 1 for side in range(2)]
    widths = parent.geometry.hidden_size, parent.geometry.moe_intermediate_size
    strengths = [STRENGTHS[at] * width for at, width in zip(best, widths, strict=True)]
    mean = Squares(
        {proj: torch.cat([part.sums[proj] for part in squares]).mean() for proj in PROJECTIONS},
        torch.cat([part.mass for part in squares]).mean(),
    )
    return Prior(
        pooled + pooled_moment(test, device),
        torch.tensor(strengths, dtype=torch.float64),
        traces / max(tokens, 1.0),
        mean,
    )


def state_problem(
    parent: Parent,
    layer: int,
    experts: Sequence[int],
    routing: Routing,
    gradient: Tensor,
    prior: Prior,
    device: torch.device,
) -> Problem:
    """Gathers the statistics of a batch of experts.

    Args:
        parent: Whose experts.
        layer: Their layer.
        experts: The batch.
        routing: Of all calibration tokens.
        gradient: With respect to the layer's outputs, `[T', C]` for the leading T' tokens.
        prior: Of the layer.
        device: To compute on.
    """
    weights = parent.expert_weights(layer, experts, device)
    outer, inner = expert_moments(routing, experts, weights)
    strengths, traces = prior.strengths.tolist(), prior.traces.tolist()
    from_inputs = shrink(outer, strengths[0], traces[0], prior.pooled)
    return Problem(
        weights,
        {"gate_proj": from_inputs, "up_proj": from_inputs, "down_proj": shrink(inner, strengths[1], traces[1])},
        squared_derivatives(routing.part(0, len(gradient)), gradient, experts, weights).sensitivities(prior.mean),
        outer.tokens,
    )


def held_out_losses(
    weight: Tensor, fit: Moments, test: Moments, codebook: Codebook, pooled: Tensor | None
) -> tuple[Tensor, int]:
    """How each of `STRENGTHS` does on held-out tokens.

    Returns:
        Relative output errors, summed over the experts that have an output on held-out tokens, float64 `[strengths]`;
        and how many these are.
    """
    energy = ((weight @ test.sums) * weight).sum((1, 2))
    seen = energy > 0
    losses = torch.zeros(len(STRENGTHS), dtype=torch.float64)
    per_token = float(fit.traces.sum() / fit.tokens.sum().clamp_min(1))
    for at, share in enumerate(STRENGTHS) if seen.any() else ():
        hessian = shrink(fit, share * weight.shape[-1], per_token, pooled)
        encoded = encode_matrices(weight, hessian, factorize(hessian, codebook.tier.d), codebook, refits=0)
        error = weight - encoded.dequantize(codebook)
        loss = ((error @ test.sums) * error).sum((1, 2)) / energy
        losses[at] = float(loss[seen].double().sum())
    return losses, int(seen.sum())


def _spread(routing: Routing, experts: int) -> list[int]:
    """`SAMPLED` experts, or all there are, evenly over their order by number of tokens."""
    counts = torch.bincount(routing.chosen.flatten().long().cpu(), minlength=experts)
    order = counts.argsort(descending=True, stable=True)
    places = torch.linspace(0, experts - 1, min(SAMPLED, experts)).round().long()
    return sorted(order[places].tolist())


def encode_experts(problem: Problem, codebooks: Mapping[str, Codebook]) -> dict[str, Tensor]:
    """Encodes every projection in every tier.

    Returns:
        Planes of expert number e of the batch as `{e}.{proj}.{tier}.{part}`, in the stored layout, on the CPU;
        `costs`: second-order estimate of the KL divergence at `steps.SENSITIVITY_TEMPERATURE`, nats over all
        calibration tokens, float64 `[B, 3, 4]`;
        `errors`: output error relative to the output, likewise;
        `tokens`: calibration tokens, float32 `[B]`; `zeros`: how many of its projections are all 0, int64 `[B]`.
    """
    result: dict[str, Tensor] = {}
    zeros = torch.stack([~weight.flatten(1).any(1).cpu() for weight in problem.weights.values()]).sum(0)
    shape = (len(problem.weights["gate_proj"]), len(PROJECTIONS), len(TIERS))
    costs, errors = torch.zeros(shape, dtype=torch.float64), torch.zeros(shape, dtype=torch.float64)
    for p, proj in enumerate(PROJECTIONS):
        weight, hessian = problem.weights[proj], problem.hessians[proj]
        # Pruned experts, all 0, are encoded exactly: error 0 of output 0.
        energy = ((weight @ hessian) * weight).sum((1, 2)).clamp_min(torch.finfo(torch.float32).tiny)
        factors = {d: factorize(hessian, d) for d in {tier.d for tier in TIERS.values()}}
        for t, (letter, tier) in enumerate(TIERS.items()):
            encoded = encode_matrices(weight, hessian, factors[tier.d], codebooks[letter])
            costs[:, p, t] = (problem.sensitivities[proj] * encoded.errors).sum(1).double().cpu() / 2
            errors[:, p, t] = (encoded.errors.sum(1) / energy).double().cpu()
            for at in range(len(weight)):
                planes = _planes(encoded, at, letter, proj)
                result.update({f"{at}.{proj}.{letter}.{part}": plane for part, plane in planes.items()})
    return result | {"costs": costs, "errors": errors, "tokens": problem.tokens.cpu(), "zeros": zeros}


def _planes(encoded: Encoded, at: int, letter: str, proj: str) -> dict[str, Tensor]:
    refinement = None if encoded.refinement is None else encoded.refinement[at].cpu()
    planes = pack(encoded.codes[at].cpu(), refinement, TIERS[letter], proj)
    return planes | {"scales": pack_scales(encoded.scales[at].cpu(), proj)}
