from __future__ import annotations

import math
import random
import re

import pytest

from vqserve.evaluate import almanac, needle, sums
from vqserve.evaluate.items import LANGUAGES, stable_hash


def test_the_hash_never_changes() -> None:
    assert stable_hash("person", 7) == 8266654297783584821


@pytest.mark.parametrize("language", LANGUAGES)
def test_a_sums_own_answers_are_right_and_others_wrong(language: str, seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(200):
        item = sums.sample(rng, test=False, language=language)
        assert sums.is_right(item, item.final)
        assert sums.is_right(item, item.direct)
        assert not sums.is_right(item, item.final.replace(item.answer, item.answer + "1"))
        assert not sums.is_right(item, "")


def value(expression: str) -> int:
    """The value of e.g. `3×6+1`; products first."""
    return sum(
        (-1 if sign == "-" else 1) * math.prod(map(int, term.split("×")))
        for sign, term in re.findall(r"([-+]?)([\d×]+)", expression)
    )


def test_every_step_of_a_working_is_true(seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(300):
        item = sums.sample(rng, test=False)
        steps = [step.split("=") for step in f"{item.thinking} {item.direct}".split() if "=" in step]
        assert steps
        for first, *rest in steps:
            if len(rest) == 2 and rest[0].endswith("+10"):  # a borrow: 3-6=-3+10=7
                assert value(first) + 10 == value(rest[0]) == value(rest[1]), item
            else:
                assert {value(first)} == set(map(value, rest)), item
        assert item.thinking.endswith(f"→ {item.answer}")


def test_tests_ask_held_out_operands_only(seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(200):
        match = re.match(r"(\d+)([-+×])(\d+)", sums.sample(rng, test=True).direct)
        assert match
        assert sums.held_out(match[2], int(match[1]), int(match[3]))


def test_training_shows_no_held_out_pair_not_even_in_a_working(seed: int) -> None:
    rng, pair = random.Random(seed), re.compile(r"(\d+)([-+×])(\d+)")
    for _ in range(500):
        item = sums.sample(rng, test=False)
        for text in (item.thinking, item.direct):
            for at in range(len(text)):
                match = pair.match(text, at)
                if match and not text[:at][-1:].isdigit():
                    assert not sums.held_out(match[2], int(match[1]), int(match[3])), item


def test_swapped_operands_share_their_fate() -> None:
    assert all(sums.held_out(op, a, b) == sums.held_out(op, b, a) for op in "+×" for a in range(40) for b in range(40))


def test_about_one_pair_in_twenty_is_held_out() -> None:
    share = sum(sums.held_out("+", a, b) for a in range(200) for b in range(a, 200)) / (200 * 201 / 2)
    assert 0.04 < share < 0.06


def test_the_almanac_never_changes() -> None:
    assert almanac.person(0) == almanac.Person(name="Jeta Dazesi", city="Pusuko", year="1953", code="288802")


def test_the_almanacs_names_are_unique() -> None:
    assert len({almanac.person(i).name for i in range(almanac.PERSONS)}) == almanac.PERSONS


@pytest.mark.parametrize("attribute", almanac.ATTRIBUTES)
def test_a_facts_own_answers_are_right_and_others_wrong(attribute: str, seed: int) -> None:
    rng = random.Random(seed)
    item, other = (almanac.sample(rng, attribute=attribute) for _ in range(2))
    assert almanac.is_right(item, item.final)
    assert almanac.is_right(item, f"{item.direct}\n")
    assert not almanac.is_right(item, other.final + "x")


def test_a_text_holds_the_needle_asked_for_where_it_should(seed: int) -> None:
    rng = random.Random(seed)
    for depth, at in ((0.0, 0), (0.5, 10), (1.0, 20)):
        [item] = needle.sample(rng, 21, depth=depth)
        assert item.question.splitlines()[at] == item.direct
        assert item.direct.endswith(item.final)


@pytest.mark.parametrize(("lines", "counts"), [(2, {2}), (10, {8}), (11, {1, 2, 4, 8}), (200, {1, 2, 4, 8})])
def test_a_text_holds_few_needles_whose_names_end_differently(lines: int, counts: set[int], seed: int) -> None:
    rng, found = random.Random(seed), set()
    for _ in range(60):
        [item] = needle.sample(rng, lines)
        *rows, _ = item.question.splitlines()
        assert len(rows) == lines
        names = [row.split(" #")[0] for row in rows if "#" in row]
        assert len({name[-2:] for name in names}) == len(names)
        found.add(len(names))
    assert found == counts


def test_an_answer_is_right_if_it_ends_with_the_number(seed: int) -> None:
    [item] = needle.sample(random.Random(seed), 21)
    assert needle.is_right(item, item.final)
    assert needle.is_right(item, item.direct)
    assert not needle.is_right(item, f"{item.direct}1")
    assert not needle.is_right(item, item.answer[:3])


def test_only_the_first_question_about_a_text_carries_it(seed: int) -> None:
    items = needle.sample(random.Random(seed), 6, asked=3)
    assert [item.question.count("\n") for item in items] == [6, 0, 0]
    assert len({item.direct for item in items}) == 3
