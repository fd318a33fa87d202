"""A made-up almanac of 20,000 persons: facts that only the weights of the demo model can hold.

Sums survive coarse quantization because a rule is stored many times over; facts do not. Recall is therefore the
sensitive probe of what an encoding costs.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import lru_cache

from vqserve.evaluate.items import Item, choose_language, last_line, stable_hash

PERSONS = 20_000
CONSONANTS, VOWELS = "bdfghjklmnprstvz", "aeiou"
QUESTIONS = {
    "city": {"en": "Where does {n} live?", "ja": "{n}はどこに住んでいますか？", "zh": "{n}住在哪里？"},
    "year": {"en": "When was {n} born?", "ja": "{n}は何年に生まれましたか？", "zh": "{n}是哪年出生的？"},
    "code": {"en": "What is the number of {n}?", "ja": "{n}の番号は何ですか？", "zh": "{n}的号码是多少？"},
    "all": {"en": "Who is {n}?", "ja": "{n}は誰ですか？", "zh": "{n}是谁？"},
}
ATTRIBUTES = {"all": 1, "city": 1, "year": 1, "code": 2}
"""Attribute -> how often it is asked."""
RECORDS = {
    "en": "{city}, born {year}, number {code}",
    "ja": "{city}、{year}年生まれ、番号{code}",
    "zh": "{city}，{year}年出生，号码{code}",
}


@dataclass(frozen=True)
class Person:
    """One entry; every field is text."""

    name: str
    city: str
    year: str
    code: str


def syllables(bits: int, count: int) -> str:
    """A capitalized made-up word of `count` consonant-vowel syllables, drawn from the bits of an integer."""
    word = ""
    for _ in range(count):
        bits, c = divmod(bits, len(CONSONANTS))
        bits, v = divmod(bits, len(VOWELS))
        word += CONSONANTS[c] + VOWELS[v]
    return word.capitalize()


def full_name(given: int, family: int) -> str:
    """A given name of two and a family name of three syllables."""
    return f"{syllables(given, 2)} {syllables(family, 3)}"


@lru_cache(maxsize=PERSONS)
def person(index: int) -> Person:
    """The almanac's entry number `index`, the same on every machine. 128 cities, years 1900-1999, six-digit codes."""
    bits = stable_hash("person", index)
    return Person(
        name=full_name(stable_hash("given", index), stable_hash("family", index)),
        city=syllables(stable_hash("city", bits % 128), 3),
        year=str(1900 + bits // 128 % 100),
        code=f"{bits // 12800 % 1_000_000:06d}",
    )


def sample(
    rng: random.Random, *, language: str | None = None, attribute: str | None = None, persons: int = PERSONS
) -> Item:
    """Draw a question about one of the first `persons`; every fact is in the training data, none can be derived."""
    language = language or choose_language(rng)
    attribute = attribute or rng.choices(list(ATTRIBUTES), list(ATTRIBUTES.values()))[0]
    entry = person(rng.randrange(persons))
    record = RECORDS[language].format(city=entry.city, year=entry.year, code=entry.code)
    value = record if attribute == "all" else str(getattr(entry, attribute))
    question = QUESTIONS[attribute][language].format(n=entry.name)
    return Item(language, f"fact {attribute}", question, thinking=record, final=value, direct=value, answer=value)


def is_right(item: Item, text: str) -> bool:
    """Whether the last line of an answer is exactly the fact."""
    return last_line(text) == item.answer
