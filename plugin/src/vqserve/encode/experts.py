"""Encodes a few experts of one layer in every tier: statistics, shrinkage, codes, and what each choice costs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from vqserve.encode.assign import factorize
from vqserve.encode.parent import Parent
from vqserve.encode.statistics import Moments, Routing, expert_moments, pooled_moment, sensitivities, shrink
from vqserve.encode.vq import Encoded, encode_matrices
from vqserve.format.config import PROJECTIONS
from vqserve.format.tiers import TIERS
from vqserve.reference.dequantize import Codebook
from vqserve.reference.pack import pack, pack_scales

STRENGTHS = (0.0, 0.125, 0.5, 2.0, 8.0)
"""Shrinkage strengths tried, in multiples of the number of columns."""
_HELD_OUT = 8
"""One token in so many is held out to choose the strength."""
_PROBE = "c"
"""Tier that the strengths are compared in."""


@dataclass(frozen=True)
class Problem:
    """What to encode, and in which metric.

    Attributes:
        weights: By projection, float32 `[B, R, C]`.
        hessians: By projection, float32 `[B, C, C]`; gate and up share theirs.
        sensitivities: By projection, float32 `[B, R]`.
    """

    weights: Mapping[str, Tensor]
    hessians: Mapping[str, Tensor]
    sensitivities: Mapping[str, Tensor]


def state_problem(
    parent: Parent,
    layer: int,
    experts: range,
    routing: Routing,
    gradient: Tensor,
    codebooks: Mapping[str, Codebook],
    device: torch.device,
) -> Problem:
    """Gathers the statistics of a batch of experts.

    Args:
        parent: Whose experts.
        layer: Their layer.
        experts: The batch.
        routing: Of all calibration tokens.
        gradient: With respect to the layer's outputs, `[T', C]` for the leading T' tokens.
        codebooks: By tier; one of them serves to compare shrinkage strengths.
        device: To compute on.
    """
    weights = parent.experts(layer, experts, device)
    held_out = len(routing) // _HELD_OUT
    test, fit = routing.part(0, held_out), routing.part(held_out, len(routing))
    test_outer, test_inner = expert_moments(test, experts, weights)
    fit_outer, fit_inner = expert_moments(fit, experts, weights)
    pooled = pooled_moment(fit, device)
    probe = codebooks[_PROBE]
    outer = choose_strength(weights["gate_proj"], fit_outer, test_outer, probe, pooled)
    inner = choose_strength(weights["down_proj"], fit_inner, test_inner, probe, None)
    from_inputs = shrink(fit_outer + test_outer, outer, pooled + pooled_moment(test, device))
    return Problem(
        weights,
        {
            "gate_proj": from_inputs,
            "up_proj": from_inputs,
            "down_proj": shrink(fit_inner + test_inner, inner, None),
        },
        sensitivities(routing.part(0, len(gradient)), gradient, experts, weights),
    )


def choose_strength(weight: Tensor, fit: Moments, test: Moments, codebook: Codebook, pooled: Tensor | None) -> Tensor:
    """The shrinkage strength with the least mean relative output error on held-out tokens.

    Returns:
        In tokens, float32 `[B]`: the same for all experts but those without an output on held-out tokens. They have few
        tokens to trust, and take the strongest.
    """
    energy = ((weight @ test.sums) * weight).sum((1, 2))
    seen = energy > 0
    strengths = [share * weight.shape[-1] for share in STRENGTHS]
    best, least = strengths[-1], math.inf
    for strength in strengths if seen.any() else ():
        hessian = shrink(fit, strength, pooled)
        encoded = encode_matrices(weight, hessian, factorize(hessian, codebook.tier.d), codebook, refits=0)
        error = weight - encoded.dequantize(codebook)
        loss = ((error @ test.sums) * error).sum((1, 2)) / energy
        mean = float(loss[seen].mean())
        if mean < least:
            best, least = strength, mean
    return torch.where(seen, best, strengths[-1])


def encode_experts(problem: Problem, codebooks: Mapping[str, Codebook]) -> dict[str, Tensor]:
    """Encodes every projection in every tier.

    Returns:
        Planes of expert number e of the batch as `{e}.{proj}.{tier}.{part}`, in the stored layout, on the CPU;
        `costs`: second-order estimate of the KL divergence at `steps.SENSITIVITY_TEMPERATURE`, nats over all
        calibration tokens, float64 `[B, 3, 4]`;
        `errors`: output error relative to the output, likewise.
    """
    result: dict[str, Tensor] = {}
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
    return result | {"costs": costs, "errors": errors}


def _planes(encoded: Encoded, at: int, letter: str, proj: str) -> dict[str, Tensor]:
    refinement = None if encoded.refinement is None else encoded.refinement[at].cpu()
    planes = pack(encoded.base[at].cpu(), refinement, TIERS[letter], proj)
    return planes | {"scales": pack_scales(encoded.scales[at].cpu(), proj)}
