"""`vqserve encode SRC DST --bits 2.25 --calibration FILE`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from vqserve.arguments import positive, seed, size
from vqserve.encode.pipeline import FILE_SIZE, encode
from vqserve.format.tiers import TIERS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `vqserve encode`."""
    reachable = sorted(tier.effective_bits for tier in TIERS.values())
    parser.add_argument("src", type=Path, metavar="SRC", help="parent checkpoint: a folder of safetensors, unquantized")
    parser.add_argument(
        "dst", type=Path, metavar="DST", help="new folder for the result, or that of an interrupted encode"
    )
    parser.add_argument(
        "--bits",
        type=float,
        required=True,
        help=f"per routed-expert weight, scales included, codebooks not: {reachable[0]:g} to {reachable[-1]:g}",
    )
    parser.add_argument(
        "--calibration",
        type=Path,
        required=True,
        metavar="FILE",
        help='JSON Lines: {"messages": [...]}, {"prompt": "...", "completion": "..."} or {"text": "..."} on each line',
    )
    parser.add_argument("--seed", type=seed, default=0, help="same inputs and seed, same bytes (default: 0)")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="where to compute (default: a GPU if there is one)")
    parser.add_argument("--workers", type=positive, help="steps at once on the CPU (default: one per core)")
    parser.add_argument(
        "--file-size",
        type=size,
        default=FILE_SIZE,
        metavar="SIZE",
        help="largest file of the result, e.g. 500MiB (default: 4GiB)",
    )
    parser.add_argument(
        "--work",
        type=Path,
        metavar="FOLDER",
        help="keep results of steps here: a later encode with other --bits takes seconds (default: in DST, removed)",
    )
    parser.add_argument("--base-model", metavar="NAME", help="for the model card (default: the name of SRC)")
    parser.add_argument("--license", metavar="NAME", help="for the model card (default: that of SRC's model card)")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")


def run(args: argparse.Namespace) -> int:
    """Runs `vqserve encode`.

    Raises:
        UsageError: An argument cannot be used.
        CheckpointError: SRC is not a checkpoint that can be encoded.
    """
    plan = encode(
        args.src,
        args.dst,
        bits=args.bits,
        calibration=args.calibration,
        seed=args.seed,
        progress=not args.quiet,
        workers=args.workers,
        device=args.device,
        file_size=args.file_size,
        work=args.work,
        base_model=args.base_model,
        license_name=args.license,
    )
    sys.stdout.write(
        f"{args.dst}: {plan.bits:.4f} bits per routed-expert weight, "
        f"allocation cost {plan.cost:.4g}; serve it with `vqserve serve {args.dst}`\n"
    )
    return 0
