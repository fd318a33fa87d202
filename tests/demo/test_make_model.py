"""What `make demo-model` decides and writes; the numbers it decides on are measured, and take an hour."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from make_model import README, Measured, keeps_enough, make, table, with_table
from vqserve.evaluate.items import LANGUAGES
from vqserve.evaluate.needle import LENGTHS


def scores(groups: Mapping[str, float], items: int) -> dict[str, Any]:
    rows = [
        {"mode": mode, "group": group, "items": items, "right": right, "low": 0.0, "high": 1.0, "ended": 1.0}
        for mode in ("thinking", "direct")
        for group, right in groups.items()
    ]
    return {"scores": rows}


def model(sums: Mapping[str, float], needles: Mapping[int, float], **more: Any) -> Measured:
    everyone = {language: sums.get(language, 1.0) for language in LANGUAGES}
    results = {
        "arithmetic": scores({"all": 1.0, **everyone}, 100),
        "recall": scores({"all": 0.5}, 150),
        "needle": scores({f"{length} tokens": needles.get(length, 1.0) for length in LENGTHS}, 15),
    }
    return Measured("some", 12_345_678, results | more)


PARENT = model({}, {})


def test_a_folder_that_cannot_be_made_is_refused() -> None:
    with pytest.raises(SystemExit, match=r"--build /dev/null/x: cannot be made: Not a directory; name another folder"):
        make(Path("/dev/null/x"))


@pytest.mark.parametrize(
    ("sums", "needles", "enough"),
    [
        ({}, {}, True),
        ({"zh": 0.95}, {}, True),
        ({"zh": 0.94}, {}, False),
        ({}, {4096: 0.0}, True),
        ({}, {2048: 0.6}, True),
        ({}, {2048: 0.5}, False),
    ],
)
def test_every_language_and_short_needles_decide(
    sums: Mapping[str, float], needles: Mapping[int, float], enough: bool
) -> None:
    assert keeps_enough(model(sums, needles), PARENT) == enough


def test_the_table_has_a_column_per_model_and_intervals() -> None:
    encoded = model({}, {160: 0.8}, kl={"kl": {"all": {"mean": 0.0345, "low": 0.0301, "high": 0.0402}}})
    lines = table([PARENT, encoded]).splitlines()
    assert lines[0] == "|  | some | some |"
    assert lines[2] == "| bytes | 12,345,678 | 12,345,678 |"
    assert lines[3].endswith("| 0 | 0.0345 (0.0301-0.0402) |")
    [needles] = [line for line in lines if line.startswith("| needles up to 2048 tokens, direct")]
    assert needles.endswith("| 100.0% (94.0%-100.0%) | 95.0% (86.3%-98.3%) |")
    assert {line.count("|") for line in lines} == {4}


def test_the_readme_has_one_place_for_the_table_and_keeps_the_rest() -> None:
    before = README.read_text(encoding="utf-8")
    after = with_table(before, "| new |")
    assert "\n\n| new |\n\n<!-- demo table: end -->" in after
    assert with_table(after, "| other |").count("demo table: begin") == 1
    assert after.splitlines()[0] == before.splitlines()[0]
    assert after.splitlines()[-1] == before.splitlines()[-1]
