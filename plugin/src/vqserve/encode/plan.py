"""From costs to a configuration: the budget in bytes, the chosen tiers, and what they amount to."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vqserve.encode.allocate import allocate
from vqserve.format.config import PROJECTIONS, QuantConfig, Spine, VQModule
from vqserve.format.errors import UsageError
from vqserve.format.geometry import Geometry
from vqserve.format.layout import spine_modules
from vqserve.format.names import experts_module
from vqserve.format.tiers import TIERS

Table = NDArray[np.float64]


@dataclass(frozen=True)
class Plan:
    """The chosen tiers and their figures.

    Attributes:
        config: The checkpoint's `quantization_config`.
        bits: Bits per weight of the routed experts, scales included, codebooks not.
        cost: What the allocation minimized: to second order, the KL divergence of flattened predictions (see
            `steps.SENSITIVITY_TEMPERATURE`), nats per predicted token. It ranks choices.
        errors: Relative output error of each chosen option, `[layers, experts, 3]`.
    """

    config: QuantConfig
    bits: float
    cost: float
    errors: Table


def byte_budget(geometry: Geometry, bits: float) -> int:
    """Bytes for all routed experts.

    Raises:
        UsageError: No choice of tiers comes to so many bits per weight; the message names the reachable range.
    """
    weights = sum(rows * columns for rows, columns in map(geometry.expert_shape, PROJECTIONS))
    weights *= geometry.n_routed_experts * len(geometry.moe_layers)
    reachable = sorted(tier.effective_bits for tier in TIERS.values())
    if not reachable[0] <= bits <= reachable[-1]:
        raise UsageError(
            f"--bits {bits:g}: out of reach; choose from {reachable[0]:g} to {reachable[-1]:g} bits per routed-expert "
            "weight, scales included"
        )
    return int(bits * weights / 8)


def make_plan(geometry: Geometry, bits: float, costs: Table, errors: Table, predictions: int) -> Plan:
    """Chooses a tier for every projection of every expert.

    Args:
        geometry: The model's sizes.
        bits: Bits per routed-expert weight, scales included.
        costs: Cost in nats over all calibration tokens (see `batch.encode_experts`), `[layers, experts, 3, 4]`.
        errors: Relative output errors, likewise.
        predictions: Calibration tokens whose prediction counts.

    Raises:
        UsageError: The number of bits is out of reach.
    """
    budget = byte_budget(geometry, bits)
    shapes = [geometry.expert_shape(proj) for proj in PROJECTIONS]
    per_proj = [[tier.weight_bytes(*shape) for tier in TIERS.values()] for shape in shapes]
    sizes = np.broadcast_to(np.array(per_proj, dtype=np.int64), costs.shape).reshape(-1, len(TIERS))
    chosen = allocate(costs.reshape(sizes.shape), sizes, budget).reshape(costs.shape[:-1])
    letters = np.array(list(TIERS))[chosen]
    modules = tuple(
        VQModule(experts_module(layer), {proj: "".join(letters[at, :, p]) for p, proj in enumerate(PROJECTIONS)})
        for at, layer in enumerate(geometry.moe_layers)
    )
    weights = letters.size / len(PROJECTIONS) * sum(rows * columns for rows, columns in shapes)
    taken = np.take_along_axis(sizes, chosen.reshape(-1, 1), 1).sum()
    return Plan(
        QuantConfig(modules, Spine(spine_modules(geometry))),
        bits=float(taken) * 8 / weights,
        cost=float(np.take_along_axis(costs, chosen[..., None], -1).sum()) / predictions,
        errors=np.take_along_axis(errors, chosen[..., None], -1)[..., 0],
    )
