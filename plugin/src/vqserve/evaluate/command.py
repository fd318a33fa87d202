"""`vqserve eval`: every measurement prints a table and, with `--json`, writes all it saw."""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from vqserve.arguments import positive
from vqserve.evaluate.items import LANGUAGES
from vqserve.evaluate.needle import DEPTHS, LENGTHS
from vqserve.format.errors import UsageError
from vqserve.format.files import read_config
from vqserve.tables import check_targets, print_table, write_json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the measurements and their options."""
    tasks = parser.add_subparsers(dest="task", metavar="MEASUREMENT", required=True)
    for task, text in (
        ("arithmetic", "held-out sums in three languages, put to a server"),
        ("recall", "facts of the demo model's almanac, put to a server"),
        ("needle", "numbers to look up in long texts, put to a server"),
    ):
        served = tasks.add_parser(task, help=text, description=text[0].upper() + text[1:] + ".")
        served.add_argument("url", metavar="URL", help="e.g. http://127.0.0.1:8001; API key in VLLM_API_KEY")
        served.add_argument("--model", metavar="NAME", help="default: the first one that the server lists")
        served.add_argument(
            "--mode", choices=("thinking", "direct", "both"), default="both", help="default: %(default)s"
        )
        if task == "needle":
            each = f"{len(LANGUAGES)} languages x {len(DEPTHS)} depths in turn"
            served.add_argument(
                "--lengths",
                type=_lengths,
                default=LENGTHS,
                metavar="N,...",
                help=f"tokens of prompt and answer; default: {','.join(map(str, LENGTHS))}",
            )
            served.add_argument(
                "--per-length", type=positive, default=60, metavar="N", help=f"{each}; default: %(default)s"
            )
            served.add_argument(
                "--answer-tokens", type=positive, default=64, metavar="N", help="room for the answer; default: 64"
            )
        else:
            served.add_argument("--per-language", type=positive, default=300, metavar="N", help="default: %(default)s")
        served.add_argument("--concurrency", type=positive, default=16, metavar="N", help="default: %(default)s")
        served.add_argument("--seed", type=int, default=0, help="which items; default: %(default)s")
        served.add_argument("--against", type=Path, metavar="FILE", help="--json of an earlier run to compare with")
        served.add_argument(
            "--gaps", action="store_true", help="keep the tokens of each answer and how sure the model was of each"
        )
        served.add_argument("--json", type=Path, metavar="FILE", help="write items, answers and scores")
    kl = tasks.add_parser(
        "kl", help="KL divergence of a checkpoint from its parent", description="KL(parent || model)."
    )
    kl.add_argument("model", type=Path, metavar="MODEL", help="folder of the checkpoint")
    kl.add_argument("parent", type=Path, metavar="PARENT", help="folder of its bf16 parent")
    kl.add_argument(
        "--text", type=Path, metavar="FILE", help='JSON lines of "prompt" and "completion"; default: sums and facts'
    )
    kl.add_argument("--per-language", type=positive, default=100, metavar="N", help="default: %(default)s")
    kl.add_argument("--seed", type=int, default=0, help="which texts; default: %(default)s")
    kl.add_argument("--json", type=Path, metavar="FILE", help="write the table")


def run(args: argparse.Namespace) -> int:
    """Measures and prints.

    Raises:
        UsageError: The server cannot be reached, or a file is not what it should be.
        CheckpointError: A checkpoint is damaged.
    """
    inputs = [args.model, args.parent, args.text] if args.task == "kl" else [args.against]
    check_targets({"--json": args.json}, inputs)
    report = _kl(args) if args.task == "kl" else _questions(args)
    if args.json:
        write_json(args.json, report)
    return 0


def _questions(args: argparse.Namespace) -> dict[str, Any]:
    from vqserve.evaluate.questions import MODES, check_same, compare, draw, draw_needles, measure, table
    from vqserve.evaluate.served import Server

    before = _read_run(args.against) if args.against else None
    server = Server(args.url, args.model, args.concurrency, gaps=args.gaps)
    modes = list(MODES) if args.mode == "both" else [args.mode]
    if args.task == "needle":
        server = replace(server, max_tokens=args.answer_tokens)
        asked = draw_needles(server, args.lengths, args.per_length, args.seed)
    else:
        asked = draw(args.task, args.per_language, args.seed)
    if before is not None:
        check_same(before, modes, asked)
    results = measure(args.task, server, modes, asked, progress=sys.stderr.isatty())
    rows, items = table(results), [result.to_dict() for result in results]
    title = f"{args.task}, seed {args.seed}"
    shown = _by_length_and_depth(rows) if args.task == "needle" else list(map(_shown, rows))
    print_table(title, list(shown[0]), [list(row.values()) for row in shown], names=2)
    report: dict[str, Any] = {"task": args.task, "url": args.url, "seed": args.seed, "scores": rows, "items": items}
    if before is not None:
        report["against"] = paired = compare(items, before)
        print(f"against {args.against}: {paired['gained']} gained, {paired['lost']} lost, p = {paired['p']:.3g}")
        print(f"  {paired['same']} of {len(items)} answers the same, reasoning apart")
        if (parted := paired.get("parted")) is not None:
            widest = f"; there the likeliest token led by at most {max(parted):.3f} nats" if parted else ""
            print(f"  {len(parted)} part from the earlier one in some token{widest}")
    return report


def _shown(row: Mapping[str, Any]) -> dict[str, str]:
    return {
        "mode": row["mode"],
        "group": row["group"],
        "items": str(row["items"]),
        "right": f"{row['right']:.1%}",
        "95 % interval": f"{row['low']:.1%} - {row['high']:.1%}",
        "ended": f"{row['ended']:.1%}",
    }


def _by_length_and_depth(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """A line per group, and in those of a length what is right at each depth, 0 % being the text's first line."""
    found = {(row["mode"], row["group"]): row for row in rows}
    lines = []
    for (mode, group), row in found.items():
        if " at " in group:
            continue
        line = _shown(row)
        for depth in DEPTHS:
            part = found.get((mode, f"{group} at {depth:.0%}"))
            line[f"at {depth:.0%}"] = f"{round(part['right'] * part['items'])}/{part['items']}" if part else ""
        lines.append(line)
    return lines


def _lengths(text: str) -> tuple[int, ...]:
    return tuple(sorted({positive(length) for length in text.split(",")}))


def _read_run(path: Path) -> list[dict[str, Any]]:
    try:
        items: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["items"]
        for item in items:
            if not isinstance(item["right"], bool):
                raise TypeError(item["right"])
            item["mode"], item["question"], item["expected"]
            for token, gap in item.get("tokens", ()):
                str(token), float(gap)
    except OSError as cause:
        raise UsageError(f"--against {path}: cannot be read ({cause.strerror}); write one with --json") from cause
    except (ValueError, KeyError, TypeError, RecursionError) as cause:
        raise UsageError(f"--against {path}: not the --json of a run; write one with --json") from cause
    return items


def _kl(args: argparse.Namespace) -> dict[str, Any]:
    for folder in (args.model, args.parent):
        read_config(folder)
    from vqserve.evaluate.kl import divergence
    from vqserve.model.weights import open_model, open_tokenizer

    tokenizer = open_tokenizer(args.parent)
    samples = _read_samples(args.text) if args.text else _draw_samples(tokenizer, args)
    result = divergence(
        open_model(args.parent), open_model(args.model), tokenizer, samples, progress=sys.stderr.isatty()
    )
    rows = {
        name: (
            str(d.tokens),
            f"{d.mean:.5f}",
            f"{d.low:.5f} - {d.high:.5f}",
            f"{d.median:.2g}",
            f"{d.p95:.3g}",
            f"{d.p99:.3g}",
            f"{d.top1:.2%}",
        )
        for name, d in result.items()
    }
    columns = ("stratum", "tokens", "mean", "95 % interval", "median", "p95", "p99", "same first")
    title = f"KL({args.parent} || {args.model}), nats per answer token"
    print_table(title, columns, [(name, *row) for name, row in rows.items()])
    return {"model": str(args.model), "parent": str(args.parent), "kl": {k: d.to_dict() for k, d in result.items()}}


def _draw_samples(tokenizer: Any, args: argparse.Namespace) -> list[Any]:
    from vqserve.evaluate import almanac, sums
    from vqserve.evaluate.items import LANGUAGES
    from vqserve.evaluate.kl import Sample

    rng, samples = random.Random(f"kl/{args.seed}"), []
    for language in LANGUAGES:
        for i in range(args.per_language):
            thinking, fact = i % 2 == 0, i % 4 < 2
            item = almanac.sample(rng, language=language) if fact else sums.sample(rng, test=True, language=language)
            messages = [{"role": "user", "content": item.question}]
            try:
                prompt = tokenizer.apply_chat_template(
                    messages, tokenize=False, add_generation_prompt=True, enable_thinking=thinking
                )
            except Exception as error:  # a template is a program, and fails as programs do
                problem = f"its chat template makes no prompt of a question ({str(error).partition(chr(10))[0]})"
                raise UsageError(f"{args.parent}: {problem}; correct it, or give texts with --text") from error
            answer = item.answered(thinking=thinking) + "<|user|>"
            samples.append(Sample(f"{'facts' if fact else 'sums'} {language}", prompt, answer))
    return samples


def _read_samples(path: Path) -> list[Any]:
    from vqserve.evaluate.kl import Sample
    from vqserve.model.tokens import check_characters

    if not path.is_file():
        raise UsageError(f"--text {path}: no such file; name one of JSON lines, or leave it out")
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as cause:
        raise UsageError(f"--text {path}: not UTF-8 ({cause})") from cause
    samples = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            texts = record["prompt"], record["completion"]
        except (ValueError, KeyError, TypeError, RecursionError):
            texts = ("", "")
        if not all(isinstance(text, str) and text for text in texts):
            expected = '{"prompt": "...", "completion": "..."}, neither empty'
            raise UsageError(f"--text {path}:{number}: expected {expected}")
        check_characters("".join(texts), f"--text {path}:{number}")
        samples.append(Sample("text", *texts))
    if not samples:
        raise UsageError(f"--text {path}: empty; name one of JSON lines, or leave it out")
    return samples
