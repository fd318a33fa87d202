"""`vqserve bench`: measurements on the GPU that is there; each prints a table and says which targets it meets."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from vqserve.arguments import positive, seed
from vqserve.checkpoint.assume import SEED_MIX
from vqserve.format.errors import CheckpointError, UsageError
from vqserve.format.strict_json import parse_object
from vqserve.format.tiers import TIERS
from vqserve.tables import check_picture, check_targets, gib, print_table, write_json

STOCK_EXPERTS = 32
"""Routed experts of the model in vLLM's own 4 bit: 256 would not fit, and a single stream reads 8 of either."""
BATCHES = (1, 2, 4, 8, 16, 64, 512, 4096)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the measurements and their options."""
    tasks = parser.add_subparsers(dest="task", metavar="MEASUREMENT", required=True)
    kernels = tasks.add_parser(
        "kernels",
        help="one layer's routed experts at GLM-5.2's sizes",
        description="One layer's routed experts at GLM-5.2's sizes: time, share of the card's limits, and beside it "
        "torch's operators and, where they are installed, vLLM's own experts in bf16 and 4 bit and AQLM's kernels.",
    )
    known = ["mix", *TIERS]
    kernels.add_argument(
        "--tiers", type=_names(known), default=known, metavar="NAME,...", help=f"default: {','.join(known)}"
    )
    kernels.add_argument(
        "--ranks", type=_numbers, default=(1, 2), metavar="N,...", help="ranks that share an expert; default: 1,2"
    )
    kernels.add_argument(
        "--tokens", type=_numbers, default=BATCHES, metavar="N,...", help=f"default: {','.join(map(str, BATCHES))}"
    )
    kernels.add_argument("--seed", type=seed, default=0, help="which codes and activations; default: %(default)s")
    kernels.add_argument("--json", type=Path, metavar="FILE", help="write everything measured")
    kernels.add_argument("--plot", type=Path, metavar="FILE", help="draw times against the card's limits")
    model = tasks.add_parser(
        "model",
        help="a whole model of made-up weights at GLM-5.2's sizes, decoded by vLLM",
        description="A whole model of made-up weights at GLM-5.2's sizes, decoded by vLLM: experts at the mix of the "
        "published checkpoint, everything else in 4 bit as `vqserve encode` writes it.",
    )
    model.add_argument("--layers", type=positive, default=78, metavar="N", help="default: %(default)s")
    model.add_argument(
        "--rank-of", type=positive, default=1, metavar="N", help="what one of N tensor-parallel ranks computes, alone"
    )
    model.add_argument("--tp", type=positive, default=1, metavar="N", help="tensor-parallel ranks, a GPU each")
    model.add_argument(
        "--contexts", type=_numbers, default=(128, 2048), metavar="N,...", help="of a single stream; default: 128,2048"
    )
    model.add_argument(
        "--batches", type=_numbers, default=(2, 4, 8, 16), metavar="N,...", help="streams at once; default: 2,4,8,16"
    )
    model.add_argument(
        "--prompts", type=_numbers, default=(512, 2048), metavar="N,...", help="of a prompt alone; default: 512,2048"
    )
    model.add_argument("--stock", action="store_true", help="also vLLM's own 4 bit in everything, 32 experts of it")
    model.add_argument("--alone", action="store_true", help="with --tp: also one of those ranks, alone on one GPU")
    model.add_argument("--utilization", type=float, default=0.92, metavar="X", help="of GPU memory; default: 0.92")
    model.add_argument(
        "--engine", type=_engine, default={}, metavar="JSON", help="further arguments of vllm.LLM, as an object"
    )
    model.add_argument("--json", type=Path, metavar="FILE", help="write everything measured")
    model.add_argument("--plot", type=Path, metavar="FILE", help="draw where a step's time goes")


def run(args: argparse.Namespace) -> int:
    """Measures and prints.

    Returns:
        0, or 1 if a target is missed.

    Raises:
        UsageError: There is no GPU, or a file cannot be written.
    """
    check_targets({"--json": args.json, "--plot": args.plot}, [])
    if args.plot:
        check_picture(args.plot)
    import torch

    if not torch.cuda.is_available():
        raise UsageError("no CUDA GPU found; run this on a machine with one")
    return _kernels(args) if args.task == "kernels" else _model(args)


def _kernels(args: argparse.Namespace) -> int:
    from vqserve.bench.kernels import measure

    mixes = {name: SEED_MIX if name == "mix" else {name: 1.0} for name in args.tiers}
    found = measure(real_config(), mixes, args.ranks, args.tokens, args.seed, progress=sys.stderr.isatty())
    card = found["machine"]
    title = (
        f"One layer's routed experts of GLM-5.2, bf16, on {card['gpu']} (torch {card['torch']}): us, medians; "
        f"copy {found['copy bytes per second'] / 1e12:.2f} TB/s"
    )
    columns = ["tiers", "kernel", "ranks", "tokens", "us", "MB", "% of copy", "% of shared"]
    columns += ["torch", "vLLM bf16", "vLLM 4 bit", "AQLM 2 bit"]
    print_table(title, columns, [_shown(row) for row in found["rows"]], names=2)
    _print_targets(found["targets"])
    if args.json:
        write_json(args.json, found)
    if args.plot:
        from vqserve.bench.picture import draw

        draw(args.plot, found)
    return 0 if all(target["met"] for target in found["targets"]) else 1


def _print_targets(targets: Iterable[Mapping[str, Any]]) -> None:
    for target in targets:
        mark = "met" if target["met"] else "MISSED"
        print(f"{mark}: {target['text']}: {target['limit']:g}, found {target['found']:.2f}")


def _model(args: argparse.Namespace) -> int:
    from vqserve.bench.model import ALONE, OURS, STOCK, floors, run_engine, stock_config, targets, vq_config
    from vqserve.bench.timing import copy_bandwidth, machine

    if args.tp > 1 and (args.rank_of > 1 or args.stock):
        option = "--rank-of" if args.rank_of > 1 else "--stock"
        raise UsageError(f"{option}: is of one GPU, and so does not go with --tp {args.tp}; leave one of them out")
    if args.alone and args.tp == 1:
        raise UsageError("--alone: compares with the ranks of --tp; give that too, or --rank-of instead")
    config = real_config()
    asked = {
        "context": max([*args.contexts, *args.prompts]) + 128,
        "utilization": args.utilization,
        "contexts": args.contexts,
        "batches": args.batches,
        "prompts": args.prompts,
        "engine": args.engine,
    }
    ours = vq_config(config, SEED_MIX, args.layers, args.rank_of)
    runs = {OURS: run_engine(ours, ranks=args.tp, **asked)}
    if args.stock:
        stock = stock_config(config, args.layers, args.rank_of, STOCK_EXPERTS)
        runs[STOCK] = run_engine(stock, ranks=1, **asked)
    if args.alone:
        runs[ALONE] = run_engine(vq_config(config, SEED_MIX, args.layers, args.tp), ranks=1, **asked)
    found = {"machine": machine(), "layers": args.layers, "rank of": args.rank_of, "tp": args.tp, "runs": runs}
    found["floors"] = floors(ours, args.tp, copy_bandwidth())
    found["targets"] = targets(runs)
    _print_model(found)
    if args.json:
        write_json(args.json, found)
    if args.plot:
        from vqserve.bench.picture import draw_steps

        draw_steps(args.plot, found)
    return 0 if all(target["met"] for target in found["targets"]) else 1


def _print_model(found: Mapping[str, Any]) -> None:
    runs, card = found["runs"], found["machine"]
    share = f", one rank of {found['rank of']}" if found["rank of"] > 1 else ""
    print(f"{found['layers']} layers{share}, TP={found['tp']}, {card['gpu']}, torch {card['torch']}")
    for name, run_ in runs.items():
        settings = (run_[key] for key in ("model class", "compilation mode", "graph mode"))
        print(f"{name}: {', '.join(settings)}; loaded in {run_['load seconds']:.0f} s")
    rows = []
    first = next(iter(runs.values()))
    for what in first["seconds per step"]:
        batch = int(what.rpartition(" ")[2]) if "batch" in what else 1
        times = [run_["seconds per step"][what] for run_ in runs.values()]
        rows.append([f"{what}, tok/s", *(f"{batch / seconds:.1f}" for seconds in times)])
    for tokens in first["first token seconds"]:
        times = [run_["first token seconds"][tokens] for run_ in runs.values()]
        rows.append([f"first token after {tokens}, ms", *(f"{1e3 * seconds:.1f}" for seconds in times)])
    rows.append(["weights per rank", *(gib(max(run_["weight bytes per rank"])) for run_ in runs.values())])
    rows.append(["KV cache, tokens", *(str(run_["KV cache tokens"]) for run_ in runs.values())])
    print_table("What vLLM does with it", ["", *runs], rows)
    columns = ["us per decode step", *(f"{name} ({what})" for name in runs for what in ("calls", "us")), "bytes alone"]
    lines = []
    for group in first["groups"]:
        cells = [f"{run_['groups'][group][what]:.0f}" for run_ in runs.values() for what in ("calls", "us")]
        floor = found["floors"].get(group)
        lines.append([group, *cells, "" if floor is None else f"{floor:.0f}"])
    print_table("Where a step of a single stream goes", columns, lines)
    _print_targets(found["targets"])


def real_config() -> dict[str, Any]:
    """GLM-5.2's `config.json`."""
    name = "glm-5.2.json"
    return parse_object(resources.files("vqserve.data").joinpath(name).read_bytes(), name)


def _shown(row: Mapping[str, Any]) -> list[str]:
    others = [row[name] for name in ("eager_us", "bf16_us", "marlin_us", "aqlm_us")]
    return [
        row["tiers"],
        row["kernel"],
        str(row["ranks"]),
        str(row["tokens"]),
        f"{row['us']:.1f}",
        f"{row['nbytes'] / 1e6:.1f}",
        f"{row['copy_share']:.0%}",
        f"{row['shared_share']:.0%}",
        *("" if us is None else f"{us:.1f}" for us in others),
    ]


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(dict.fromkeys(positive(number) for number in text.split(",")))


def _engine(text: str) -> dict[str, Any]:
    try:
        return parse_object(text.encode(), "--engine")
    except CheckpointError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _names(known: list[str]) -> Any:
    def names(text: str) -> tuple[str, ...]:
        found = tuple(dict.fromkeys(text.split(",")))
        if unknown := [name for name in found if name not in known]:
            raise argparse.ArgumentTypeError(f"{unknown[0]!r}: expected some of {','.join(known)}")
        return found

    return names
