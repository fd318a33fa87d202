"""Looking a number up in a text inside the prompt: a needle in a haystack, from a few lines to the whole context.

A needle is a line `Name #1234`; all other lines are filler, `Name City`, about as long. Three things made it learnable
for the demo model, which earlier could only guess:

- A separator token between key and value, ` #`, followed by single digits. With ` #8` as one token the question's own
  mention of the name, which other text follows, misled the heads that copy: the first digit was a guess, the others
  were right. With `Name: 1234` it never told whose number is whose.
- Few needles, whose names end in different syllables. A list of 300 names with numbers is another task, and harder.
- Training texts that fill their whole length, so that far places are seen as often as near ones.
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping

from vqserve.evaluate.almanac import full_name, syllables
from vqserve.evaluate.items import LANGUAGES, Item, choose_language, last_line

QUESTIONS = {
    "en": "In the list, what is the number of {n}?",
    "ja": "リストで{n}の番号は何ですか？",
    "zh": "列表中{n}的号码是多少？",
}
MOST_NEEDLES = 8
NEEDLES = (1, 2, 4, MOST_NEEDLES)
"""How many needles a text of more than `SHORT` lines holds, each number as often; a shorter one holds all it can."""
SHORT = 10
LENGTHS = (160, 512, 1024, 2048, 4096)
"""Tokens of a prompt with the room for its answer that `vqserve eval needle` asks at."""
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
"""Where the asked line stands: 0 = first, 1 = last."""


def sample(
    rng: random.Random,
    lines: int,
    *,
    asked: int = 1,
    language: str | None = None,
    depth: float | None = None,
    kind: str = "needle",
) -> list[Item]:
    """Draw a text and questions about its needles: one chat, the text standing before its first question.

    Args:
        rng: Source of randomness.
        lines: Lines of the text.
        asked: How many different needles are asked for; fewer if the text has fewer.
        language: Language of the questions; drawn by `USAGE` if None.
        depth: Fixes where the first needle asked for stands, 0 = first line, 1 = last; random places if None.
        kind: The items' `kind`.
    """
    language = language or choose_language(rng)
    most = min(lines, MOST_NEEDLES)
    count = most if lines <= SHORT else max(rng.choice(NEEDLES), min(asked, most))
    numbers = _needles(rng, count)
    rows = [f"{full_name(rng.getrandbits(40), rng.getrandbits(40))} {_city(rng)}" for _ in range(lines)]
    for (name, number), place in zip(numbers.items(), _places(rng, lines, count, depth), strict=True):
        rows[place] = f"{name} #{number}"
    text = "".join(f"{row}\n" for row in rows)
    items: list[Item] = []
    for name in list(numbers)[:asked]:
        question = QUESTIONS[language].format(n=name)
        line = f"{name} #{numbers[name]}"
        asks = question if items else text + question
        items.append(Item(language, kind, asks, line, f"#{numbers[name]}", line, numbers[name]))
    return items


def draw(lines: Mapping[int, int], per_length: int, seed: int) -> list[Item]:
    """Items of every length, languages and depths in turn; `LANGUAGES` x `DEPTHS` of them have each combination once.

    Args:
        lines: Lines of a text by the length in tokens that it stands for.
        per_length: Items of each length.
        seed: Of the draws.
    """
    rng, items = random.Random(f"needle/{seed}"), []
    for length, count in lines.items():
        for i in range(per_length):
            language, depth = LANGUAGES[i % len(LANGUAGES)], DEPTHS[i // len(LANGUAGES) % len(DEPTHS)]
            kind = f"{length} tokens at {depth:.0%}"
            items += sample(rng, count, language=language, depth=depth, kind=kind)
    return items


def is_right(item: Item, text: str) -> bool:
    """Whether the number is the last one in the last line of an answer; a direct one repeats the line it found."""
    return re.findall(r"[0-9]+", last_line(text))[-1:] == [item.answer]


def _needles(rng: random.Random, count: int) -> dict[str, str]:
    """Names that end in different syllables, each with its number."""
    numbers: dict[str, str] = {}
    endings: set[str] = set()
    while len(numbers) < count:
        name = full_name(rng.getrandbits(40), rng.getrandbits(40))
        if name[-2:] not in endings:
            endings.add(name[-2:])
            numbers[name] = f"{rng.randrange(10_000):04d}"
    return numbers


def _places(rng: random.Random, lines: int, count: int, depth: float | None) -> list[int]:
    if depth is None:
        return rng.sample(range(lines), count)
    first = round(depth * (lines - 1))
    return [first, *rng.sample([place for place in range(lines) if place != first], count - 1)]


def _city(rng: random.Random) -> str:
    return syllables(rng.getrandbits(40), 3)
