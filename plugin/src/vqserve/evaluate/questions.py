"""`vqserve eval arithmetic`, `recall` and `needle`: items put to a served model, scored, tabled and compared."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from vqserve.evaluate import almanac, needle, sums
from vqserve.evaluate.items import LANGUAGES, Item
from vqserve.evaluate.served import Reply, Server
from vqserve.evaluate.statistics import mcnemar, wilson
from vqserve.format.errors import UsageError

TASKS = {"arithmetic": sums, "recall": almanac, "needle": needle}
"""Task -> the module that judges its answers."""
MODES = {"thinking": True, "direct": False}
PROBED_LINES = (12, 60)
"""Lines of the texts that tell how many tokens a line takes."""


@dataclass(frozen=True)
class Result:
    """One item, the model's answer, and whether it is right. An answer that did not end is never right."""

    item: Item
    mode: str
    reply: Reply
    right: bool

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        tokens = {"tokens": [list(token) for token in self.reply.tokens]} if self.reply.tokens else {}
        return {
            "mode": self.mode,
            "language": self.item.language,
            "kind": self.item.kind,
            "question": self.item.question,
            "expected": self.item.answer,
            "reasoning": self.reply.reasoning,
            "content": self.reply.content,
            "ended": self.reply.ended,
            "prompt_tokens": self.reply.prompt_tokens,
            "right": self.right,
            **tokens,
        }


def draw(task: str, per_language: int, seed: int) -> list[Item]:
    """The items of a task by language: held-out sums, or facts with every attribute equally often."""
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


def draw_needles(server: Server, lengths: Sequence[int], per_length: int, seed: int) -> list[Item]:
    """The items of the needle task, in texts as long as the server's tokenizer makes them.

    Two short texts in every language tell what a line takes.

    Args:
        server: Is asked for its context, and to count; its `max_tokens` is the room for an answer.
        lengths: Tokens of prompt and answer.
        per_length: Items of each length.
        seed: Of the draws.

    Raises:
        UsageError: The server cannot be reached or does not count, or a length is beyond its context or has no room.
    """
    context = server.context()
    if context is not None and max(lengths) > context:
        problem = f"--lengths {max(lengths)}: {server.url} serves {context} tokens"
        raise UsageError(f"{problem}; choose shorter ones, or serve with a larger --max-model-len")
    few, many = PROBED_LINES
    probes = needle.draw({few: few, many: many}, len(LANGUAGES), seed)
    counts = [reply.prompt_tokens for reply in replace(server, max_tokens=1).ask(probes, thinking=False)]
    short, long = counts[: len(LANGUAGES)], counts[len(LANGUAGES) :]
    line = max((b - a) / (many - few) for a, b in zip(short, long, strict=True))
    if line <= 0:
        raise UsageError(f"{server.url}: counts no tokens of a prompt (`usage`), without which a length means nothing")
    besides = max(short) - few * line
    lines = {length: int((length - server.max_tokens - besides) / line) for length in lengths}
    for length, count in lines.items():
        if count < 1:
            raise UsageError(f"--lengths {length}: no room for a line beside {server.max_tokens} tokens of answer")
    return needle.draw(lines, per_length, seed)


def measure(task: str, server: Server, modes: Sequence[str], items: Sequence[Item], *, progress: bool) -> list[Result]:
    """Put the items of a task to a server, once per mode.

    Raises:
        UsageError: The server cannot be reached, or refuses.
    """
    judge, results = TASKS[task], []
    for mode in modes:
        replies = server.ask(items, thinking=MODES[mode], progress=progress)
        for item, reply in zip(items, replies, strict=True):
            results.append(Result(item, mode, reply, reply.ended and judge.is_right(item, reply.content)))
    return results


def table(results: Sequence[Result]) -> list[dict[str, Any]]:
    """A row per mode and language, and per mode and kind: share right with its 95 % interval, and share that ended.

    Kinds `A at B` have a row for A before theirs.
    """
    rows = []
    for mode in dict.fromkeys(result.mode for result in results):
        chosen = [result for result in results if result.mode == mode]
        groups: dict[str, list[Result]] = {"all": chosen}
        for result in chosen:
            groups.setdefault(result.item.language, []).append(result)
        for result in chosen:
            kind = result.item.kind
            for name in dict.fromkeys((kind.partition(" at ")[0], kind)):
                groups.setdefault(name, []).append(result)
        for name, group in groups.items():
            right, ended = sum(r.right for r in group), sum(r.reply.ended for r in group)
            low, high = wilson(right, len(group))
            row = {"mode": mode, "group": name, "items": len(group), "right": right / len(group)}
            rows.append(row | {"low": low, "high": high, "ended": ended / len(group)})
    return rows


def check_same(before: Sequence[Mapping[str, Any]], modes: Sequence[str], items: Sequence[Item]) -> None:
    """Refuse, before anything is asked, to compare with a run on other items.

    Raises:
        UsageError: That run had another task, seed, size or modes.
    """
    wanted = [(mode, item.question, item.answer) for mode in modes for item in items]
    if wanted != [(row["mode"], row["question"], row["expected"]) for row in before]:
        raise UsageError("--against: expected a run of the same task, seed, size and modes; run that one again")


def compare(now: Sequence[Mapping[str, Any]], before: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Paired comparison of two runs on the same items (`Result.to_dict` of each).

    Returns:
        `gained` and `lost` items, McNemar's exact two-sided `p`, and `same`, how many answers are the same in every
        character, reasoning apart. If both runs kept their tokens, `parted` as well: per answer whose tokens part, the
        nats by which either was likelier than the next likely one where they do, the larger of both runs'.
    """
    pairs = list(zip(now, before, strict=True))
    gained = sum(a["right"] and not b["right"] for a, b in pairs)
    lost = sum(b["right"] and not a["right"] for a, b in pairs)
    found: dict[str, Any] = {"gained": gained, "lost": lost, "p": mcnemar(gained, lost)}
    found["same"] = sum(a["content"] == b.get("content") for a, b in pairs)
    if all("tokens" in row for pair in pairs for row in pair):
        found["parted"] = [gap for a, b in pairs if (gap := _parting(a["tokens"], b["tokens"])) is not None]
    return found


def _parting(now: Sequence[Sequence[Any]], before: Sequence[Sequence[Any]]) -> float | None:
    """How sure the surer of two runs was of the first token in which they differ; None if they do not.

    Up to there both saw the same text. The token that ends an answer is not among its tokens: of an answer that is the
    other's beginning, the other's next token tells.
    """
    for (token, gap), (other, its) in zip(now, before, strict=False):
        if token != other:
            return float(max(gap, its))
    longer = max(now, before, key=len)
    shared = min(len(now), len(before))
    return float(longer[shared][1]) if len(longer) > shared else None
