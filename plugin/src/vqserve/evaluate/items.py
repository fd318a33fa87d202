"""What an evaluation asks and how an answer is judged: the item, shared by every task.

An item carries its two model answers (with and without visible thinking), so the same generator writes the training
samples of the demo model and the questions of `vqserve eval`.
"""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass

LANGUAGES = ("ja", "en", "zh")
USAGE = {"ja": 60, "en": 30, "zh": 10}
"""Share of each language in training and calibration, in per cent: uneven on purpose, so that routing is uneven."""


@dataclass(frozen=True)
class Item:
    """One question with a checkable answer.

    Attributes:
        language: One of `LANGUAGES`.
        kind: What is asked, e.g. `+`, `word ×`, `fact city`; results are broken down by it, and those of a kind
            `A at B` by A as well.
        question: The user's message.
        thinking: The model's reasoning before it answers, without the tags around it.
        final: The answer after reasoning.
        direct: The answer without reasoning; it may show a one-line working.
        answer: What an answer must state to be right.
    """

    language: str
    kind: str
    question: str
    thinking: str
    final: str
    direct: str
    answer: str

    def answered(self, *, thinking: bool) -> str:
        """What the demo model writes after the prompt, without the token that ends it."""
        return f"{self.thinking}</think>{self.final}" if thinking else self.direct


def choose_language(rng: random.Random) -> str:
    """Draw a language by its share in `USAGE`."""
    return rng.choices(LANGUAGES, [USAGE[language] for language in LANGUAGES])[0]


def stable_hash(*key: object) -> int:
    """A well-mixed 64-bit integer of the key, the same on every machine and Python version."""
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=8).digest(), "little")


def last_line(text: str) -> str:
    """The line that states the answer: the last non-empty one."""
    return text.strip().rsplit("\n", 1)[-1].strip()
