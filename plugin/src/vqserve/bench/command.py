"""`vqserve bench`: measurements on the GPU that is there; each prints a table and says which targets it meets."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from vqserve.arguments import positive, seed
from vqserve.checkpoint.assume import SEED_MIX
from vqserve.format.errors import UsageError
from vqserve.format.strict_json import parse_object
from vqserve.format.tiers import TIERS
from vqserve.tables import check_writable, print_table, write_json

BATCHES = (1, 2, 4, 8, 16, 64, 512, 4096)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the measurements and their options."""
    tasks = parser.add_subparsers(dest="task", metavar="MEASUREMENT", required=True)
    kernels = tasks.add_parser(
        "kernels",
        help="one layer's routed experts at GLM-5.2's sizes",
        description="One layer's routed experts at GLM-5.2's sizes: time, share of the card's limits, and beside it "
        "torch's operators and, where vLLM is installed, its own experts in bf16 and 4 bit.",
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


def run(args: argparse.Namespace) -> int:
    """Measures and prints.

    Returns:
        0, or 1 if a target is missed.

    Raises:
        UsageError: There is no GPU, or a file cannot be written.
    """
    check_writable("--json", args.json)
    check_writable("--plot", args.plot)
    import torch

    if not torch.cuda.is_available():
        raise UsageError("no CUDA GPU found; run this on a machine with one")
    from vqserve.bench.kernels import measure

    mixes = {name: SEED_MIX if name == "mix" else {name: 1.0} for name in args.tiers}
    found = measure(real_config(), mixes, args.ranks, args.tokens, args.seed, progress=sys.stderr.isatty())
    card = found["machine"]
    title = (
        f"One layer's routed experts of GLM-5.2, bf16, on {card['gpu']} (torch {card['torch']}): us, medians; "
        f"copy {found['copy bytes per second'] / 1e12:.2f} TB/s"
    )
    columns = ["tiers", "kernel", "ranks", "tokens", "us", "MB", "% of copy", "% of shared"]
    columns += ["torch", "vLLM bf16", "vLLM 4 bit"]
    print_table(title, columns, [_shown(row) for row in found["rows"]], names=2)
    for target in found["targets"]:
        mark = "met" if target["met"] else "MISSED"
        print(f"{mark}: {target['text']}: {target['limit']:g}, found {target['found']:.2f}")
    if args.json:
        write_json(args.json, found)
    if args.plot:
        from vqserve.bench.picture import draw

        draw(args.plot, found)
    return 0 if all(target["met"] for target in found["targets"]) else 1


def real_config() -> dict[str, Any]:
    """GLM-5.2's `config.json`."""
    name = "glm-5.2.json"
    return parse_object(resources.files("vqserve.data").joinpath(name).read_bytes(), name)


def _shown(row: Mapping[str, Any]) -> list[str]:
    others = [row[name] for name in ("eager_us", "bf16_us", "marlin_us")]
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


def _names(known: list[str]) -> Any:
    def names(text: str) -> tuple[str, ...]:
        found = tuple(dict.fromkeys(text.split(",")))
        if unknown := [name for name in found if name not in known]:
            raise argparse.ArgumentTypeError(f"{unknown[0]!r}: expected some of {','.join(known)}")
        return found

    return names
