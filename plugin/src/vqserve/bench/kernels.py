"""`vqserve bench kernels`: one layer's routed experts, every tier and batch, beside what else there is."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from vqserve.bench import stock
from vqserve.bench.layer import bytes_read, random_layer, random_routing
from vqserve.bench.timing import copy_bandwidth, eager_us, graph_us, kernel_us, machine, shared_bandwidth
from vqserve.format.flat import Slot
from vqserve.format.geometry import Geometry
from vqserve.kernels.experts import KernelExperts
from vqserve.kernels.moe import moe
from vqserve.kernels.vq_gemm import cuda as gather
from vqserve.kernels.vq_moe import cuda as lut
from vqserve.reference.moe import Experts
from vqserve.reference.moe import moe as reference_moe

TOLERANCE = 2e-3
"""Relative error of a result in bf16 against the reference in fp64; rounding alone makes 1.7e-3."""
GATED = 2
"""Tokens of a batch that are compared with the reference, the first and the last."""
PAIRS = 64
"""A graph has as many calls, each for its own tokens, as come to so many choices of experts; at least one."""
PROMPTS = (512, 4096)
"""Batches that a target compares with vLLM's bf16 experts."""
EAGER_TOKENS = 16
"""The largest batch that torch's operators are timed with: they take minutes for more. AQLM's are for few, too."""


@dataclass(frozen=True)
class Row:
    """One measurement; times in microseconds, rates as shares of the card's.

    Attributes:
        tiers: Which mix.
        ranks: How many ranks share every expert; the figures are one's.
        tokens: Batch.
        kernel: Which of ours took it.
        us: One layer's experts: gate and up, SiLU, down, weighted sum.
        gate_up_us, down_us: Of that the two large kernels, caches warm.
        flops: Multiplications and additions of the weights with the activations.
        nbytes: Codes and scales of the experts chosen, on average of a graph's calls.
        copy_share: `nbytes` over time, as a share of the measured copy bandwidth.
        shared_share: Reads of tables or codewords over time, as a share of what shared memory moves.
        error: Relative error of the tokens compared.
        eager_us: Torch dequantizing; None if not run, as in what follows.
        bf16_us, marlin_us: vLLM's fused experts in bf16 and in 4 bit.
        aqlm_us: AQLM's kernels at 2 bit.
    """

    tiers: str
    ranks: int
    tokens: int
    kernel: str
    us: float
    gate_up_us: float
    down_us: float
    flops: int
    nbytes: int
    copy_share: float
    shared_share: float
    error: float
    eager_us: float | None
    bf16_us: float | None
    marlin_us: float | None
    aqlm_us: float | None


@dataclass(frozen=True)
class Target:
    """What the kernels should reach: `found` at least, or at most, `limit` times something."""

    text: str
    limit: float
    found: float
    met: bool

    @classmethod
    def at_least(cls, limit: float, found: float, what: str) -> Target:
        """One that more is better for."""
        return cls(f"at least so many times {what}", limit, found, found >= limit)

    @classmethod
    def at_most(cls, limit: float, found: float, what: str) -> Target:
        """One that less is better for."""
        return cls(f"at most so many times {what}", limit, found, found <= limit)


def measure(
    config: Mapping[str, Any],
    mixes: Mapping[str, Mapping[str, float]],
    ranks: Sequence[int],
    batches: Sequence[int],
    seed: int,
    progress: bool,
) -> dict[str, Any]:
    """Measures one layer.

    Args:
        config: A parsed `config.json` without `quantization_config`.
        mixes: Names to shares of the tiers.
        ranks: Numbers of tensor-parallel ranks.
        batches: Numbers of tokens.
        seed: Which codes and activations.
        progress: Whether to show a bar on stderr.

    Returns:
        The machine, its limits, a row per measurement and the targets, ready for JSON.

    Raises:
        RuntimeError: A kernel's result is wrong: nothing is reported.
    """
    geometry = Geometry.from_dict(config)
    copy, shared = copy_bandwidth(), shared_bandwidth()
    rows: list[Row] = []
    with tqdm(total=len(ranks) * len(mixes) * len(batches), disable=not progress, unit="row") as bar:
        for number in ranks:
            theirs = _stock(geometry, number, batches)
            for name, mix in mixes.items():
                experts = random_layer(config, mix, number, seed)
                ready = KernelExperts.of(experts)
                for tokens in batches:
                    rows.append(
                        _row(experts, ready, geometry, name, number, tokens, seed, copy, shared, theirs[tokens])
                    )
                    bar.update()
                del experts, ready
                torch.cuda.empty_cache()
    return {
        "machine": machine(),
        "copy bytes per second": copy,
        "shared memory bytes per second": shared,
        "rows": [asdict(row) for row in rows],
        "targets": [asdict(target) for target in targets(rows, copy)],
    }


def targets(rows: Sequence[Row], copy: float) -> list[Target]:
    """The targets that the rows measured say something about; `copy` in bytes per second."""
    found = []
    for row in rows:
        if row.tiers != "mix":
            continue
        if (row.ranks, row.tokens) == (1, 1) and row.eager_us:
            found.append(Target.at_least(60, row.eager_us / row.us, "faster than torch, 1 token"))
        if (row.ranks, row.tokens) == (2, 1):
            floor = row.nbytes / copy * 1e6
            found.append(Target.at_most(2.5, row.us / floor, "the bytes' time, 1 token, one rank of 2"))
        if row.tokens in PROMPTS and row.bf16_us:
            what = f"vLLM's bf16 experts' time, {row.tokens} tokens, one rank of {row.ranks}"
            found.append(Target.at_most(2, row.us / row.bf16_us, what))
    return found


def _stock(geometry: Geometry, ranks: int, batches: Sequence[int]) -> dict[int, tuple[float | None, ...]]:
    """Times per batch of vLLM's own experts, in bf16 and in 4 bit, and of AQLM's kernels.

    None where vLLM, aqlm, its compiler or the memory is missing.
    """
    sizes = geometry.n_routed_experts, geometry.hidden_size, geometry.moe_intermediate_size // ranks
    every = max(batches)
    times = []
    for make, most, ids_on in (
        (stock.fused_bf16, every, "cuda"),
        (stock.marlin_4_bit, every, "cuda"),
        (stock.aqlm_2_bit, EAGER_TOKENS, "cpu"),
    ):
        times.append(_times(partial(make, *sizes), geometry, batches, most, ids_on))
        torch.cuda.empty_cache()
    return dict(zip(batches, zip(*times, strict=True), strict=True))


def _times(
    make: Callable[[], stock.Call], geometry: Geometry, batches: Sequence[int], most: int, ids_on: str
) -> list[float | None]:
    """Of one of them; None for batches of more than `most` tokens, and where it cannot be made."""

    def us(call: stock.Call, tokens: int) -> float | None:
        if tokens > most:
            return None
        routed = _routings(geometry, tokens, 0)
        return graph_us([partial(call, x, weights, ids.to(ids_on)) for x, weights, ids in routed])

    try:
        call = make()
        return [us(call, tokens) for tokens in batches]
    except (ImportError, torch.cuda.OutOfMemoryError):
        return [None] * len(batches)


def _routings(geometry: Geometry, tokens: int, seed: int) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Activations, weights and ids for as many calls as a graph has."""
    top_k, number = geometry.num_experts_per_tok, geometry.n_routed_experts
    calls = max(1, PAIRS // (tokens * top_k))
    return [random_routing(tokens, geometry.hidden_size, number, top_k, seed + at) for at in range(calls)]


def _row(
    experts: Experts,
    ready: KernelExperts,
    geometry: Geometry,
    name: str,
    ranks: int,
    tokens: int,
    seed: int,
    copy: float,
    shared: float,
    theirs: tuple[float | None, ...],
) -> Row:
    routings = _routings(geometry, tokens, seed)
    x, weights, ids = routings[0]
    kernel = "tables" if lut.takes(tokens, ids.shape[1], ready) else "gather"
    calls = [partial(moe, x, weights, ids, ready) for x, weights, ids in routings]
    error = _error(calls[0](), experts, x, weights, ids)
    if not error < TOLERANCE:
        raise RuntimeError(f"tiers {name}, {ranks} ranks, {tokens} tokens: relative error {error:.2g}, not reported")
    parts, us = kernel_us(calls[0]), graph_us(calls)
    slow = eager_us(lambda: stock.eager(experts)(x, weights, ids)) if tokens <= EAGER_TOKENS else None
    nbytes = sum(bytes_read(experts, ids) for _, _, ids in routings) // len(routings)
    looked_up = _looked_up(experts, ids, kernel)
    return Row(
        name,
        ranks,
        tokens,
        kernel,
        us,
        parts.get("gate_up", 0.0),
        parts.get("down", 0.0),
        6 * ids.numel() * geometry.hidden_size * geometry.moe_intermediate_size // ranks,
        nbytes,
        nbytes / us * 1e6 / copy,
        looked_up / us * 1e6 / shared,
        error,
        slow,
        *theirs,
    )


def _error(found: Tensor, experts: Experts, x: Tensor, weights: Tensor, ids: Tensor) -> float:
    some = torch.linspace(0, len(x) - 1, min(GATED, len(x))).long().to(x.device)
    expected = reference_moe(x[some].double(), weights[some], ids[some], experts)
    return float((found[some].double() - expected).norm() / expected.norm())


def _looked_up(experts: Experts, ids: Tensor, kernel: str) -> int:
    """Bytes of shared memory read for codes: table entries for each pair, or codewords for each block of pairs."""
    total = 0
    block = gather.block_tokens(ids.numel(), len(experts.layout.slots))
    for expert, pairs in zip(*(part.tolist() for part in ids.unique(return_counts=True)), strict=True):
        for slot in experts.layout.slots[expert].values():
            total += _codes(slot) * (4 * pairs if kernel == "tables" else 2 * slot.tier.d * -(-pairs // block))
    return total


def _codes(slot: Slot) -> int:
    return slot.rows * slot.columns // slot.tier.d * (2 if slot.tier.refinement_rows else 1)
