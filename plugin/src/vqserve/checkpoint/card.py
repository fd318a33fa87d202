"""`vqserve card CHECKPOINT --scores RESULT...`: puts what `vqserve eval --json` measured into the model card."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from vqserve.format.card import CARD, with_scores
from vqserve.format.errors import UsageError
from vqserve.format.files import check_checkpoint
from vqserve.format.manifest import replace_file

_SHOWN = re.compile(r"all|ja|en|zh|\d+ tokens")
"""Groups of a served measurement that the card shows; the rest (kinds, depths) is in the result's file."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the arguments of `vqserve card`."""
    parser.add_argument("path", type=Path, metavar="CHECKPOINT", help="folder of the checkpoint that was measured")
    parser.add_argument(
        "--scores", type=Path, nargs="+", required=True, metavar="RESULT", help="files that `vqserve eval --json` wrote"
    )


def run(args: argparse.Namespace) -> int:
    """Replaces the scores of the card. The checkpoint is checked first and its manifest follows.

    Raises:
        CheckpointError: The checkpoint is damaged, or its card has no place for scores.
        UsageError: A result is not one.
    """
    scores = "\n\n".join(_section(path) for path in args.scores)
    check_checkpoint(args.path)
    card = with_scores((args.path / CARD).read_text(encoding="utf-8"), scores)
    replace_file(args.path, CARD, card)
    print(f"{args.path / CARD}: holds the scores of {len(args.scores)} results; the manifest is right again")
    return 0


def _section(path: Path) -> str:
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
        return "\n".join(_divergence(result) if "kl" in result else _answers(result))
    except (KeyError, TypeError, ValueError) as cause:
        raise UsageError(f"{path}: not what `vqserve eval --json` writes ({cause!r})") from cause


def _divergence(result: Mapping[str, Any]) -> Iterator[str]:
    yield "KL divergence from the parent, nats per answer token, with its 95 % bootstrap interval:\n"
    yield from _header("stratum", "tokens", "mean", "interval", "same first token")
    for stratum, row in result["kl"].items():
        interval = f"{row['low']:.5f} - {row['high']:.5f}"
        yield _row(stratum, f"{row['tokens']:d}", f"{row['mean']:.5f}", interval, f"{row['top1']:.2%}")


def _answers(result: Mapping[str, Any]) -> Iterator[str]:
    yield f"`vqserve eval {result['task']}`, seed {result['seed']:d}, greedy answers of the served model:\n"
    yield from _header("mode", "group", "items", "right", "95 % interval")
    for row in result["scores"]:
        if _SHOWN.fullmatch(row["group"]):
            interval = f"{row['low']:.1%} - {row['high']:.1%}"
            yield _row(row["mode"], row["group"], f"{row['items']:d}", f"{row['right']:.1%}", interval)
    if "against" in result:
        paired = result["against"]
        yield f"\nAgainst the parent on the same items: {paired['gained']:d} gained, {paired['lost']:d} lost."


def _header(*columns: str) -> Sequence[str]:
    return _row(*columns), "|---" * len(columns) + "|"


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"
