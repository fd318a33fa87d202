"""`vqserve eval arithmetic` and `recall`: items put to a served model, scored, tabled and compared."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vqserve.evaluate import almanac, sums
from vqserve.evaluate.items import LANGUAGES, Item
from vqserve.evaluate.served import Reply, Server
from vqserve.evaluate.statistics import mcnemar, wilson
from vqserve.format.errors import UsageError

TASKS = {"arithmetic": sums, "recall": almanac}
"""Task -> the module that draws its items and judges answers."""
MODES = {"thinking": True, "direct": False}


@dataclass(frozen=True)
class Result:
    """One item, the model's answer, and whether it is right. An answer that did not end is never right."""

    item: Item
    mode: str
    reply: Reply
    right: bool

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "mode": self.mode,
            "language": self.item.language,
            "kind": self.item.kind,
            "question": self.item.question,
            "expected": self.item.answer,
            "reasoning": self.reply.reasoning,
            "content": self.reply.content,
            "ended": self.reply.ended,
            "right": self.right,
        }


def draw(task: str, per_language: int, seed: int) -> list[Item]:
    """The items of a task: held-out sums, or facts with every attribute equally often."""
    rng = random.Random(f"{task}/{seed}")
    items: list[Item] = []
    for language in LANGUAGES:
        if task == "arithmetic":
            items += [sums.sample(rng, test=True, language=language) for _ in range(per_language)]
        else:
            names = list(almanac.ATTRIBUTES)
            items += [
                almanac.sample(rng, language=language, attribute=names[i % len(names)]) for i in range(per_language)
            ]
    return items


def measure(
    task: str, server: Server, modes: Sequence[str], *, per_language: int, seed: int, progress: bool
) -> list[Result]:
    """Put the items of a task to a server, once per mode.

    Raises:
        UsageError: The server cannot be reached, or refuses.
    """
    judge, items, results = TASKS[task], draw(task, per_language, seed), []
    for mode in modes:
        replies = server.ask(items, thinking=MODES[mode], progress=progress)
        for item, reply in zip(items, replies, strict=True):
            results.append(Result(item, mode, reply, reply.ended and judge.is_right(item, reply.content)))
    return results


def table(results: Sequence[Result]) -> list[dict[str, Any]]:
    """A row per mode and language, and per mode and kind: share right with its 95 % interval, and share that ended."""
    rows = []
    for mode in dict.fromkeys(result.mode for result in results):
        chosen = [result for result in results if result.mode == mode]
        groups: dict[str, list[Result]] = {"all": chosen}
        for result in chosen:
            groups.setdefault(result.item.language, []).append(result)
        for result in chosen:
            groups.setdefault(result.item.kind, []).append(result)
        for name, group in groups.items():
            right, ended = sum(r.right for r in group), sum(r.reply.ended for r in group)
            low, high = wilson(right, len(group))
            row = {"mode": mode, "group": name, "items": len(group), "right": right / len(group)}
            rows.append(row | {"low": low, "high": high, "ended": ended / len(group)})
    return rows


def check_same(
    before: Sequence[Mapping[str, Any]], task: str, modes: Sequence[str], *, per_language: int, seed: int
) -> None:
    """Refuse, before anything is asked, to compare with a run on other items.

    Raises:
        UsageError: That run had another task, seed, size or modes.
    """
    wanted = [(mode, item.question, item.answer) for mode in modes for item in draw(task, per_language, seed)]
    if wanted != [(row["mode"], row["question"], row["expected"]) for row in before]:
        raise UsageError("--against: expected a run of the same task, seed, size and modes; run that one again")


def compare(now: Sequence[Mapping[str, Any]], before: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Paired comparison of two runs on the same items (`Result.to_dict` of each).

    Returns:
        `gained` and `lost` items, and McNemar's exact two-sided `p`.
    """
    gained = sum(a["right"] and not b["right"] for a, b in zip(now, before, strict=True))
    lost = sum(b["right"] and not a["right"] for a, b in zip(now, before, strict=True))
    return {"gained": gained, "lost": lost, "p": mcnemar(gained, lost)}
