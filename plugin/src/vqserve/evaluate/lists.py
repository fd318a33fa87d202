"""Looking a number up in a list inside the prompt: the needle task, from a few lines to the whole context.

A line is `Name #1234`. The demo's tokenizer has ` #1` as one token, so a number follows its name without a separator
token between them: with `Name: 1234` the model learned to copy numbers, but never to tell which one is whose.
"""

from __future__ import annotations

import random

from vqserve.evaluate.almanac import full_name
from vqserve.evaluate.items import Item, choose_language, last_line

QUESTIONS = {
    "en": "In the list, what is the number of {n}?",
    "ja": "リストで{n}の番号は何ですか？",
    "zh": "列表中{n}的号码是多少？",
}


def sample(
    rng: random.Random, lines: int, *, asked: int = 1, language: str | None = None, depth: float | None = None
) -> list[Item]:
    """Draw a list and questions about it: one chat, the list standing before its first question.

    Args:
        rng: Source of randomness.
        lines: How many lines the list has; each is a name and a four-digit number.
        asked: How many different names are asked for, at most `lines`.
        language: Language of the questions; drawn by `USAGE` if None.
        depth: Fixes where the asked line stands, 0 = first, 1 = last; random places if None.
    """
    language = language or choose_language(rng)
    names: dict[str, str] = {}
    while len(names) < lines:
        names[full_name(rng.getrandbits(40), rng.getrandbits(40))] = f"{rng.randrange(10_000):04d}"
    ordered = list(names)
    chosen = rng.sample(ordered, min(asked, lines)) if depth is None else [ordered[round(depth * (lines - 1))]]
    table = "".join(f"{name} #{value}\n" for name, value in names.items())
    items = []
    for i, name in enumerate(chosen):
        line = f"{name} #{names[name]}"
        question = QUESTIONS[language].format(n=name)
        asks = question if i else table + question
        items.append(Item(language, "list", asks, line, f"#{names[name]}", line, names[name]))
    return items


def is_right(item: Item, text: str) -> bool:
    """Whether an answer ends with the number; a direct answer repeats the line it found."""
    return last_line(text).rsplit("#", 1)[-1] == item.answer
