"""`vqserve plan PATH --gpus N --memory SIZE`: whether a model fits, with how long a context, and what would."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from vqserve.arguments import positive, size
from vqserve.checkpoint.assume import SEED_MIX, assumed, mix_for, read_mix
from vqserve.format.config import PROJECTIONS, QuantConfig
from vqserve.format.errors import ConfigError, UsageError
from vqserve.format.files import called, read_config, readable
from vqserve.format.geometry import Geometry
from vqserve.format.layout import checkpoint_specs
from vqserve.format.memory import ATTENTIONS, Attention, Memory, memory
from vqserve.format.strict_json import read_object
from vqserve.format.tiers import TIERS
from vqserve.tables import check_targets, gib, print_table, write_json

RESERVE = 2 << 30
"""Assumed, not measured on a card: about 1 GiB for the CUDA context and NCCL, the rest for activations."""

_MOST_RANKS = 16
"""More GPUs than a node has are not proposed."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options of `vqserve plan`."""
    parser.add_argument("path", type=Path, metavar="PATH", help="folder of a checkpoint, or a config.json alone")
    parser.add_argument("--gpus", type=positive, default=1, metavar="N", help="they split the model; default: 1")
    parser.add_argument("--memory", type=size, required=True, metavar="SIZE", help="of each GPU, such as 95GiB")
    parser.add_argument("--context", type=positive, metavar="TOKENS", help="has to fit; default: 4096 or the model's")
    parser.add_argument("--reserve", type=size, default=RESERVE, metavar="SIZE", help="see below; default: 2GiB")
    parser.add_argument("--expert-parallel", action="store_true", help="GPUs hold whole experts instead of shares")
    mix = parser.add_mutually_exclusive_group()
    mix.add_argument("--bits", type=float, metavar="B", help="of a model not encoded yet: per expert weight")
    mix.add_argument("--tiers", metavar="MIX", help="of a model not encoded yet; default: a=27,c=59,d=14")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the plan")
    parser.epilog = (
        "--reserve is an assumption: CUDA context, NCCL and activations, none of it measured on a card. "
        "Exit code 1: the context fits with neither attention."
    )


def run(args: argparse.Namespace) -> int:
    """Prints what a GPU would hold.

    Raises:
        CheckpointError: The configuration is damaged or not a GLM-MoE-DSA model's.
        UsageError: An option does not go with the model.
    """
    check_targets({"--json": args.json}, [args.path])
    with called(args.path):
        return _run(args)


def _run(args: argparse.Namespace) -> int:
    config, assumption = _config(args)
    geometry = Geometry.from_dict(config)
    context = args.context or min(4096, geometry.max_position_embeddings)
    if context > geometry.max_position_embeddings:
        raise UsageError(f"--context {context}: the model was made for at most {geometry.max_position_embeddings}")

    specs, whole = checkpoint_specs(config), args.expert_parallel

    def planned(ranks: int, attention: Attention) -> Memory:
        return memory(config, ranks=ranks, attention=attention, reserve=args.reserve, whole_experts=whole, specs=specs)

    plans: dict[Attention, Memory] = {attention: planned(args.gpus, attention) for attention in ATTENTIONS}
    bits, weights = expert_bits(config)
    if assumption:
        print(f"{args.path} is not quantized; assumed: {assumption}")
    _print_parts(f"Bytes on each of {args.gpus} GPUs of {gib(args.memory)}, {bits:.3f} bits per expert weight", plans)
    _print_contexts(plans, context, args.memory)
    fits = {attention: plan.needed(context) <= args.memory for attention, plan in plans.items()}
    for attention, plan in plans.items():
        print(f"{attention}: {_verdict(plan, context, args.memory)}")
        if not fits[attention]:
            others = partial(planned, attention=attention)
            for way in ways_out(plan, context, args.memory, bits, weights, others):
                print(f"  would fit: {way}")
    if args.json:
        report = {attention: _report(plan, context, args.memory) for attention, plan in plans.items()}
        write_json(args.json, {"path": str(args.path), "assumed": assumption, "gpus": args.gpus, **report})
    return 0 if any(fits.values()) else 1


def _config(args: argparse.Namespace) -> tuple[dict[str, Any], str | None]:
    """The configuration, and what had to be assumed of it."""
    with readable(args.path):
        folder = args.path.is_dir() or not args.path.exists()
        config = read_config(args.path) if folder else read_object(args.path, ConfigError)
    given = "--bits" if args.bits is not None else "--tiers" if args.tiers is not None else None
    if config.get("quantization_config") is not None:
        if given:
            raise UsageError(f"{given}: {args.path} is encoded and has its own tiers; leave it out")
        return config, None
    shares = SEED_MIX if args.tiers is None else read_mix(args.tiers)
    mix = shares if args.bits is None else mix_for(args.bits)
    told = ", ".join(f"{share:.0%} at {TIERS[letter].bits:g} bit" for letter, share in mix.items() if share)
    return assumed(config, mix), f"{told}, 4-bit spine"


def expert_bits(config: Mapping[str, Any]) -> tuple[float, int]:
    """Bits per weight of the vector-quantized experts, scales included, and how many weights these are."""
    geometry, quant = Geometry.from_dict(config), QuantConfig.from_dict(config["quantization_config"])
    bits, weights = 0.0, 0
    for module in quant.modules:
        for proj in PROJECTIONS if module.name in geometry.experts_modules else ():
            rows, columns = geometry.expert_shape(proj)
            weights += module.experts * rows * columns
            bits += sum(TIERS[letter].effective_bits for letter in module.tiers[proj]) * rows * columns
    return (bits / weights if weights else 0.0), weights


def ways_out(
    plan: Memory, context: int, available: int, bits: float, weights: int, planned: Callable[[int], Memory]
) -> Iterator[str]:
    """What would make room for `context` tokens, each by itself.

    Args:
        plan: What does not fit.
        context: Tokens.
        available: Bytes of one GPU.
        bits: Bits per routed-expert weight now, scales included.
        weights: How many routed-expert weights there are.
        planned: The plan for another number of GPUs.
    """
    for ranks in range(plan.ranks + 1, _MOST_RANKS + 1):
        try:
            other = planned(ranks)
        except UsageError:
            continue
        if other.needed(context) <= available:
            yield f"{ranks} GPUs of this size ({gib(other.needed(context))} on each)"
            break
    excess = plan.needed(context) - available
    fewer = math.floor((bits - excess * plan.ranks * 8 / weights) * 100) / 100 if weights else 0.0
    least = min(tier.effective_bits for tier in TIERS.values())
    if fewer >= least:
        yield f"at most {fewer:.2f} bits per expert weight (vqserve encode --bits {fewer:.2f}), now {bits:.2f}"
    shorter = plan.longest_context(available)
    if shorter:
        yield f"a context of {shorter:,} tokens"
    yield f"{gib(plan.needed(context))} on each GPU"


def _print_parts(title: str, plans: Mapping[Attention, Memory]) -> None:
    rows: list[list[str]] = []
    for heading, parts in (
        ("split", {name: plan.weights.split for name, plan in plans.items()}),
        ("on each", {name: plan.weights.whole for name, plan in plans.items()}),
    ):
        names = dict.fromkeys(part for held in parts.values() for part in held)
        rows += [[part, heading, *(gib(held.get(part, 0)) for held in parts.values())] for part in sorted(names)]
    rows.append(["all weights", "", *(gib(plan.weights.total) for plan in plans.values())])
    print_table(title, ["part", "", *plans], rows)


def _print_contexts(plans: Mapping[Attention, Memory], context: int, available: int) -> None:
    def row(name: str, value: Callable[[Memory], str]) -> list[str]:
        return [name, *(value(plan) for plan in plans.values())]

    rows = [
        row("weights", lambda plan: gib(plan.weights.total)),
        row("reserve (assumed)", lambda plan: gib(plan.reserve)),
        row("prefill buffers", lambda plan: gib(plan.buffers(context))),
        row("KV cache per token", lambda plan: f"{plan.token_bytes:,} B"),
        row(f"KV cache, {context:,} tokens", lambda plan: gib(plan.token_bytes * context)),
        row("needed", lambda plan: gib(plan.needed(context))),
        row("left", lambda plan: gib(available - plan.needed(context))),
        row("longest context", lambda plan: f"{plan.longest_context(available):,}"),
    ]
    print_table("What a GPU needs", ["", *plans], rows)


def _verdict(plan: Memory, context: int, available: int) -> str:
    needed = plan.needed(context)
    if needed > available:
        return f"{context:,} tokens do not fit: {gib(needed)} needed on each GPU, {gib(needed - available)} too much"
    share = math.ceil(needed / available * 100) / 100
    longest = plan.longest_context(available)
    return (
        f"fits, up to {longest:,} tokens; {context:,} need --gpu-memory-utilization {share:.2f} or more (default 0.92)"
    )


def _report(plan: Memory, context: int, available: int) -> dict[str, Any]:
    return {
        "weights": {"split": dict(plan.weights.split), "whole": dict(plan.weights.whole), "total": plan.weights.total},
        "reserve": plan.reserve,
        "buffers": plan.buffers(context),
        "kv_bytes_per_token": plan.token_bytes,
        "context": context,
        "needed": plan.needed(context),
        "available": available,
        "fits": plan.needed(context) <= available,
        "longest_context": plan.longest_context(available),
    }
