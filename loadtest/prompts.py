"""What is asked: generated prompts whose answers are known, so that being right under load is measured too.

Every prompt follows from seed, source, number and the run's salt alone, whichever greenlet sends it. The wording is the
one the demo model was trained on; any capable model understands it. No two prompts share a long prefix, nor do those of
two runs, whose salts differ: caches do not flatter.
"""

from __future__ import annotations

import random
import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache

from loadtest.records import Outcome

LANGUAGES = ("en", "ja", "zh")
BARE = {"en": "What is {e}?", "ja": "{e} は？", "zh": "{e} 等于多少？"}
PEOPLE = {"en": ("Tom", "Anna", "Ken"), "ja": ("太郎", "花子", "健"), "zh": ("小明", "小红", "小华")}
THINGS = {"en": ("apples", "pens", "books"), "ja": ("りんご", "ペン", "本"), "zh": ("苹果", "铅笔", "书")}
WORDED = {
    "+": {
        "en": "{p} has {a} {t} and buys {b} more. How many {t} does {p} have now?",
        "ja": "{p}は{t}を{a}個持っていて、さらに{b}個買いました。全部で何個ですか？",
        "zh": "{p}有{a}个{t}，又买了{b}个。现在一共有多少个？",
    },
    "-": {
        "en": "{p} had {a} {t} and gave away {b}. How many {t} are left?",
        "ja": "{p}は{t}を{a}個持っていて、{b}個あげました。残りは何個ですか？",
        "zh": "{p}有{a}个{t}，送出{b}个。还剩多少个？",
    },
    "×": {
        "en": "There are {a} boxes with {b} {t} each. How many {t} in all?",
        "ja": "{t}が{b}個入った箱が{a}箱あります。全部で何個ですか？",
        "zh": "有{a}个箱子，每箱有{b}个{t}。一共有多少个？",
    },
}
RESULTS: Mapping[str, Callable[[int, int], int]] = {"+": int.__add__, "-": int.__sub__, "×": int.__mul__}
ASKS_NEEDLE = {
    "en": "In the list, what is the number of {n}?",
    "ja": "リストで{n}の番号は何ですか？",
    "zh": "列表中{n}的号码是多少？",
}
SYLLABLES = tuple(consonant + vowel for consonant in "bdfghjklmnprstvz" for vowel in "aeiou")
ROW_CHARACTERS = len("Baba Bababa Bababa\n")
POOL_ROWS = 50_000
"""A list longer than these, of about a million characters, begins with them again."""
CHARACTERS_PER_TOKEN = 2.5
"""Of lists of made-up names, until `/tokenize` says better; most tokenizers have between 2 and 3."""
TEMPLATE_TOKENS = 24
"""Left for the chat template and the question's own words."""


@dataclass(frozen=True)
class Message:
    """One message of a chat."""

    role: str
    content: str


@dataclass(frozen=True)
class Prompt:
    """One request's content.

    Attributes:
        kind: What results are broken down by, e.g. `sum`, `needle 1024`.
        language: One of `LANGUAGES`; None if unknown.
        messages: The chat; its last message is the user's.
        answer: The number or text that a right answer states; None if none is known.
        expected: How the request should end.
        wanted_tokens: Tokens aimed at, where a length was asked for.
        max_tokens: Of the answer; None takes the profile's.
    """

    kind: str
    language: str | None
    messages: tuple[Message, ...]
    answer: str | None = None
    expected: Outcome = Outcome.OK
    wanted_tokens: int | None = None
    max_tokens: int | None = None

    @property
    def text(self) -> str:
        """All of it as one text, for `/v1/completions`."""
        return "\n".join(message.content for message in self.messages)

    def is_right(self, content: str) -> bool | None:
        """Whether the last line states the answer: a number as the last number in it, a text anywhere in it."""
        if self.answer is None:
            return None
        line = unicodedata.normalize("NFKC", content).strip().rsplit("\n", 1)[-1]
        answer = unicodedata.normalize("NFKC", self.answer)
        if not re.fullmatch(r"-?[0-9]+", answer):
            return answer.casefold() in line.casefold()
        # Thousands may be set apart by commas; a minus after a digit, as in 9-4=5, is an operator.
        numbers = re.findall(r"(?<![0-9])-?[0-9]+|[0-9]+", re.sub(r"(?<=[0-9]),(?=[0-9]{3})", "", line))
        return numbers[-1:] == [answer]


@dataclass(frozen=True)
class Sizing:
    """How long a text must be for a number of tokens.

    Attributes:
        characters_per_token: Of lists of made-up names.
        cap: Tokens that prompt and answer may have together; None if unknown.
        measured: Whether the server's own tokenizer was asked.
    """

    characters_per_token: float = CHARACTERS_PER_TOKEN
    cap: int | None = None
    measured: bool = False

    @classmethod
    def of(cls, count: Callable[[str], int | None], cap: int | None) -> Sizing:
        """Asks for the tokens of a sample; `count` says None where there is no `/tokenize`."""
        sample = _rows(0, 200)
        tokens = count(sample)
        return cls(len(sample) / tokens, cap, measured=True) if tokens else cls(cap=cap)


def sum_prompt(rng: random.Random, language: str) -> Prompt:
    """A bare sum, difference or product."""
    operator, a, b = _operands(rng)
    question = BARE[language].format(e=f"{a} {operator} {b}")
    return Prompt("sum", language, (Message("user", question),), str(RESULTS[operator](a, b)))


def word_prompt(rng: random.Random, language: str) -> Prompt:
    """A word problem of one step."""
    operator, a, b = _operands(rng)
    words = {"p": rng.choice(PEOPLE[language]), "t": rng.choice(THINGS[language])}
    question = WORDED[operator][language].format(a=a, b=b, **words)
    return Prompt("word", language, (Message("user", question),), str(RESULTS[operator](a, b)))


def needle_prompt(rng: random.Random, language: str, tokens: int, sizing: Sizing, salt: str = "") -> Prompt:
    """A list of about `tokens` tokens, chat template and question included, and a question about one line of it.

    With another `salt` the list is another, and the question is the same.
    """
    characters = round(max(0, tokens - TEMPLATE_TOKENS) * sizing.characters_per_token)
    name, number = _name(rng), f"{rng.randrange(10_000):04d}"
    question = ASKS_NEEDLE[language].format(n=name)
    count = max(0, characters - len(question)) // ROW_CHARACTERS
    before = rng.randint(0, count)
    filling = random.Random(f"filling/{salt}/{rng.random()}")
    # A row of its own comes first: lists that begin at the same place of the pool share no prefix.
    first, start = _row(filling) if count else "", filling.randrange(POOL_ROWS)
    rows = first + _rows(start, count - 1)
    at = before * ROW_CHARACTERS
    message = Message("user", f"{rows[:at]}{name} #{number}\n{rows[at:]}{question}")
    return Prompt(f"needle {tokens}", language, (message,), number, wanted_tokens=tokens)


def over_cap_prompt(rng: random.Random, language: str, sizing: Sizing) -> Prompt:
    """A list too long for the server by a quarter, so that no estimate is wrong by as much; refusing it is right.

    Raises:
        ValueError: The cap is not known.
    """
    if sizing.cap is None:
        raise ValueError(
            "over-cap prompts need the server's cap, which /v1/models does not state; set `cap` in the profile"
        )
    # Without the server's tokenizer twice the cap: as bad as the ratio may be.
    tokens = round(sizing.cap * (1.25 if sizing.measured else 2.0)) + 64
    needle = needle_prompt(rng, language, tokens, sizing)
    return Prompt("over cap", language, needle.messages, None, Outcome.OVER_CAP, tokens)


@dataclass(frozen=True)
class Part:
    """One kind of prompt of a mix.

    Attributes:
        draw: Makes one from a source of randomness and the request's number.
        weight: How often, in relation to the others.
    """

    draw: Callable[[random.Random, int], Prompt]
    weight: float


class Mix:
    """Prompts by number, each the same for the same seed, number and source."""

    def __init__(self, parts: Sequence[Part], seed: int, source: int = 0) -> None:
        self._parts, self._seed, self._source = tuple(parts), seed, source

    def draw(self, number: int) -> Prompt:
        """Prompt number `number`."""
        rng = random.Random(f"prompt/{self._seed}/{self._source}/{number}")
        part = rng.choices(self._parts, [part.weight for part in self._parts])[0]
        return part.draw(rng, number)


def _operands(rng: random.Random) -> tuple[str, int, int]:
    operator = rng.choice("+-×")
    if operator == "×":
        return operator, rng.randint(2, 99), rng.randint(2, 99)
    a, b = rng.randint(2, 999), rng.randint(2, 999)
    return operator, max(a, b), min(a, b)


@cache
def _pool() -> str:
    # Made once, in a fifth of a second: made for each prompt, a long list would keep all other greenlets waiting.
    rng = random.Random("rows")
    return "".join(_row(rng) for _ in range(POOL_ROWS))


def _rows(start: int, count: int) -> str:
    """So many rows of the pool."""
    pool, begin = _pool(), start * ROW_CHARACTERS
    end = begin + max(0, count) * ROW_CHARACTERS
    return (pool * (end // len(pool) + 1))[begin:end]


def _row(rng: random.Random) -> str:
    return f"{_name(rng)} {_syllables(rng, 3)}\n"


def _name(rng: random.Random) -> str:
    return f"{_syllables(rng, 2)} {_syllables(rng, 3)}"


def _syllables(rng: random.Random, count: int) -> str:
    return "".join(rng.choices(SYLLABLES, k=count)).capitalize()
