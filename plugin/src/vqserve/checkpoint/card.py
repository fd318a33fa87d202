"""`vqserve card CHECKPOINT --scores RESULT...`: puts what `vqserve eval --json` measured into the model card."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from vqserve.format.card import CARD, with_scores
from vqserve.format.errors import CheckpointError, UsageError
from vqserve.format.files import check_checkpoint
from vqserve.format.manifest import replace_file
from vqserve.format.strict_json import read_object

_MEASURE = "measure again with `vqserve eval --json`"
_MUCH = 1e6
"""Nats and shares are far below: what is not was not measured."""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9 ._-]{0,60}")
_SHOWN = re.compile(r"all|ja|en|zh|[0-9]{1,9} tokens")
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
    try:
        card = (args.path / CARD).read_text(encoding="utf-8")
    except (FileNotFoundError, UnicodeDecodeError) as cause:
        problem = "expected the model card, as UTF-8"
        raise CheckpointError(str(args.path / CARD), problem, "restore it, or encode the checkpoint again") from cause
    card = with_scores(card, scores)
    replace_file(args.path, CARD, card)
    print(f"{args.path / CARD}: holds the scores of {len(args.scores)} results; the manifest is right again")
    return 0


def _section(path: Path) -> str:
    try:
        result = read_object(path)
        return "\n".join(_divergence(result["kl"]) if "kl" in result else _answers(result))
    except CheckpointError as cause:
        raise UsageError(f"{path}: not what `vqserve eval --json` writes ({cause.problem}); {_MEASURE}") from cause
    except (AttributeError, KeyError, TypeError, ValueError) as cause:
        found = str(cause.args[0])[:100] if cause.args else ""
        raise UsageError(f"{path}: not what `vqserve eval --json` writes ({found!r}); {_MEASURE}") from cause


def _divergence(strata: Mapping[str, Any]) -> Iterator[str]:
    yield "KL divergence from the parent, nats per answer token, with its 95 % bootstrap interval:\n"
    yield from _header("stratum", "tokens", "mean", "interval", "same first token")
    if not strata:
        raise ValueError("no stratum")
    for stratum, row in strata.items():
        interval = f"{_nats(row['low']):.5f} - {_nats(row['high']):.5f}"
        counted = f"{_count(row['tokens']):d}", f"{_nats(row['mean']):.5f}", interval, f"{_share(row['top1']):.2%}"
        yield _row(_word(stratum), *counted)


def _answers(result: Mapping[str, Any]) -> Iterator[str]:
    seed = result["seed"]
    if type(seed) is not int:
        raise TypeError(seed)
    yield f"`vqserve eval {_word(result['task'])}`, seed {seed:d}, greedy answers of the served model:\n"
    yield from _header("mode", "group", "items", "right", "95 % interval")
    shown = [row for row in result["scores"] if _SHOWN.fullmatch(row["group"])]
    if not shown:
        raise ValueError("no scores")
    for row in shown:
        interval = f"{_share(row['low']):.1%} - {_share(row['high']):.1%}"
        yield _row(
            _word(row["mode"]), row["group"], f"{_count(row['items']):d}", f"{_share(row['right']):.1%}", interval
        )
    if "against" in result:
        gained, lost = (_count(result["against"][key]) for key in ("gained", "lost"))
        yield f"\nAgainst the parent on the same items: {gained:d} gained, {lost:d} lost."


def _word(value: Any) -> str:
    """A name as a table can hold it, and nothing that Markdown or the card's own marks would be read from."""
    if _NAME.fullmatch(value) is None:
        raise ValueError(value)
    return str(value)


def _count(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 1 << 53:
        raise ValueError(value)
    return value


def _share(value: Any) -> float:
    if not 0 <= _nats(value) <= 1:
        raise ValueError(value)
    return float(value)


def _nats(value: Any) -> float:
    if type(value) not in (int, float) or not abs(value) < _MUCH:
        raise ValueError(value)
    return float(value)


def _header(*columns: str) -> Sequence[str]:
    return _row(*columns), "|---" * len(columns) + "|"


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"
