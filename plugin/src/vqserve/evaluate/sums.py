"""Arithmetic in three languages: bare sums and word problems over + - × with up to four digits.

One in twenty operand pairs, chosen by a hash, is held out: training and calibration never see it solved, not even as a
step of a working; `vqserve eval arithmetic` asks nothing else. Pairs of single digits are in every working and so never
held out.
"""

from __future__ import annotations

import random
import re

from vqserve.evaluate.items import Item, choose_language, last_line, stable_hash

PEOPLE = {"en": ["Tom", "Anna", "Ken"], "ja": ["太郎", "花子", "健"], "zh": ["小明", "小红", "小华"]}
THINGS = {"en": ["apples", "pens", "books"], "ja": ["りんご", "ペン", "本"], "zh": ["苹果", "铅笔", "书"]}
QUESTIONS = {
    "en": ["What is {e}?", "Calculate {e}.", "How much is {e}?", "{e} = ?", "{e}"],
    "ja": ["{e} は？", "{e} を計算してください。", "{e} はいくつですか？", "{e} = ?", "{e}"],
    "zh": ["{e} 等于多少？", "计算 {e}。", "{e} 是多少？", "{e} = ?", "{e}"],
}
ANSWERS = {"en": "The answer is {n}.", "ja": "答えは{n}です。", "zh": "答案是{n}。"}
WORD_PROBLEMS = {
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
    "×+": {
        "en": "{p} buys {a} bags of {b} {t} and already has {c}. How many {t} does {p} have in all?",
        "ja": "{p}は{b}個入りの{t}を{a}袋買いました。もとから{c}個持っています。全部で何個ですか？",
        "zh": "{p}买了{a}袋{t}，每袋{b}个，原来有{c}个。一共有多少个？",
    },
}
KINDS = {"+": 3, "-": 3, "×": 4, "word +": 1, "word -": 1, "word ×": 1, "word ×+": 2}
"""Kind -> how often it is drawn."""


def held_out(operator: str, a: int, b: int) -> bool:
    """Whether this operand pair is kept for tests; a + b and b + a, a × b and b × a share their fate."""
    if max(a, b) < 10:
        return False
    pair = (a, b) if operator == "-" else (min(a, b), max(a, b))
    return stable_hash("operands", operator, *pair) % 20 == 0


def column_sum(a: int, b: int) -> str:
    """Addition digit by digit from the right, carries shown."""
    x, y, carry, steps = str(a)[::-1], str(b)[::-1], 0, []
    for i in range(max(len(x), len(y))):
        p, q = int(x[i : i + 1] or 0), int(y[i : i + 1] or 0)
        steps.append(f"{p}+{q}" + (f"+{carry}" if carry else "") + f"={p + q + carry}")
        carry = (p + q + carry) // 10
    return f"{a}+{b}: {' '.join(steps)} → {a + b}"


def column_difference(a: int, b: int) -> str:
    """Subtraction digit by digit from the right, borrows shown; a >= b."""
    x, y, borrow, steps = str(a)[::-1], str(b)[::-1], 0, []
    for i in range(len(x)):
        p, q = int(x[i]), int(y[i : i + 1] or 0)
        d = p - q - borrow
        steps.append(f"{p}-{q}" + (f"-{borrow}" if borrow else "") + f"={d}" + (f"+10={d + 10}" if d < 0 else ""))
        borrow = int(d < 0)
    return f"{a}-{b}: {' '.join(steps)} → {a - b}"


def row_product(a: int, digit: int) -> str:
    """A number times one digit, carries shown."""
    carry, steps = 0, []
    for p in map(int, str(a)[::-1]):
        steps.append(f"{p}×{digit}" + (f"+{carry}" if carry else "") + f"={p * digit + carry}")
        carry = (p * digit + carry) // 10
    return f"{a}×{digit}: {' '.join(steps)} → {a * digit}"


def long_product(a: int, b: int) -> str:
    """Long multiplication: a row per digit of b, each added to the total so far."""
    lines: list[str] = []
    total = 0
    for i, digit in enumerate(map(int, str(b)[::-1])):
        lines.append(row_product(a, digit))
        part = a * digit * 10**i
        if i:
            lines.append(column_sum(total, part))
        total += part
    return "\n".join(lines)


WORKINGS = {"+": column_sum, "-": column_difference, "×": long_product}
RESULTS = {"+": int.__add__, "-": int.__sub__, "×": int.__mul__}


def one_line(operator: str, a: int, b: int) -> str:
    """The working shown in a direct answer; products of two-digit numbers go through tens and ones."""
    if operator == "×" and b > 9:
        tens, ones = b // 10 * 10, b % 10
        return f"{a}×{b}={a}×{tens}+{a}×{ones}={a * tens}+{a * ones}={a * b}"
    return f"{a}{operator}{b}={RESULTS[operator](a, b)}"


def operands(rng: random.Random, operator: str) -> tuple[int, int]:
    """A pair to compute with; differences are never negative."""
    if operator == "×":
        low_a, high_a, low_b, high_b = rng.choice([(2, 99, 2, 99), (2, 999, 2, 9), (100, 999, 11, 99)])
        return rng.randint(low_a, high_a), rng.randint(low_b, high_b)
    a, b = (rng.randint(0, 10 ** rng.randint(1, 4) - 1) for _ in range(2))
    return (max(a, b), min(a, b)) if operator == "-" else (a, b)


def _bare_question(rng: random.Random, language: str, operator: str, a: int, b: int) -> str:
    sign = rng.choice("×*") if operator == "×" else operator
    question = rng.choice(QUESTIONS[language]).format(e=rng.choice(["{}{}{}", "{} {} {}"]).format(a, sign, b))
    if rng.random() < 0.1:
        question = question.lower().rstrip(".?。？ ")
    return question


def sample(rng: random.Random, *, test: bool, language: str | None = None) -> Item:
    """Draw a sum.

    Args:
        rng: Source of randomness.
        test: Draw held-out operands only; otherwise all but those.
        language: One of `LANGUAGES`; drawn by `USAGE` if None.
    """
    language = language or choose_language(rng)
    kind = rng.choices(list(KINDS), list(KINDS.values()))[0]
    while True:
        item, pair = _draw(rng, language, kind)
        if held_out(*pair) if test else not shows_held_out(f"{item.thinking} {item.direct}"):
            return item


def shows_held_out(text: str) -> bool:
    """Whether a text has a held-out pair with its operator anywhere."""
    pairs = re.findall(r"(?=(?<!\d)(\d+)([-+×])(\d+))", text)
    return any(held_out(operator, int(a), int(b)) for a, operator, b in pairs)


def _draw(rng: random.Random, language: str, kind: str) -> tuple[Item, tuple[str, int, int]]:
    operator = kind.removeprefix("word ")[0]
    a, b = (rng.randint(2, 30), rng.randint(2, 30)) if kind == "word ×+" else operands(rng, operator)
    value = RESULTS[operator](a, b)
    thinking, working = WORKINGS[operator](a, b), one_line(operator, a, b)
    if kind.startswith("word"):
        c = rng.randint(1, 99)
        person, thing = rng.choice(PEOPLE[language]), rng.choice(THINGS[language])
        question = WORD_PROBLEMS[kind.removeprefix("word ")][language].format(p=person, t=thing, a=a, b=b, c=c)
        if kind == "word ×+":
            thinking, working = f"{thinking}\n{column_sum(value, c)}", f"{working} {value}+{c}={value + c}"
            value += c
    else:
        question = _bare_question(rng, language, operator, a, b)
    final = ANSWERS[language].format(n=value)
    item = Item(language, kind, question, thinking, final, f"{working}\n{final}", str(value))
    return item, (operator, a, b)


def is_right(item: Item, text: str) -> bool:
    """Whether the last line of an answer (without its reasoning) states the result and no other number."""
    return "".join(c for c in last_line(text) if c.isdigit() or c == "-") == item.answer
