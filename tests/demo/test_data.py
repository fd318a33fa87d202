from __future__ import annotations

import itertools
import json
import random
import re
from pathlib import Path

import pytest
import torch

from data import IGNORED, Renderer, Rows, curriculum, long_text, ordinary, write_calibration
from seeds import FIXED
from vqserve.evaluate import almanac, sums

OPERANDS = re.compile(r"(\d+)([-+×])(\d+)(?==|: \d+[-+])")


@FIXED
@pytest.mark.parametrize("progress", [0.0, 0.1, 0.2, 0.5, 1.0])
def test_an_ordinary_sample_nearly_always_fits_its_row(progress: float, seed: int) -> None:
    rng, render, mix = random.Random(seed), Renderer(), curriculum(progress)
    lengths = [len(ordinary(rng, render, mix)[0]) for _ in range(500)]
    assert sum(length > 257 for length in lengths) <= 5


@pytest.mark.parametrize("progress", [0.12, 0.3, 0.5, 1.0])
def test_a_long_text_fits_its_budget(progress: float, seed: int) -> None:
    rng, render, mix = random.Random(seed), Renderer(), curriculum(progress)
    assert all(len(long_text(rng, render, mix)[0]) <= mix.text_tokens for _ in range(30))


def test_only_answers_are_learned(seed: int) -> None:
    rng, render = random.Random(seed), Renderer()
    for _ in range(50):
        ids, labels = ordinary(rng, render, curriculum(1.0))
        text = render.tokenizer.decode(ids, skip_special_tokens=False)
        learned = render.tokenizer.decode([x for x in labels if x != IGNORED], skip_special_tokens=False)
        answers = re.findall(r"<\|assistant\|>(?:<think>|</think>)(.*?<\|user\|>)", text, flags=re.DOTALL)
        assert learned == "".join(answers)
        assert all(label in (IGNORED, token) for token, label in zip(ids, labels, strict=True))


def test_rows_predict_the_next_token_and_repeat_with_their_seed() -> None:
    def chunks(seed: str) -> list[tuple[torch.Tensor, torch.Tensor]]:
        return list(itertools.islice(Rows(ordinary, length=256, tokens=10**6, start=0.0, seed=seed), 2))

    first, again, other = chunks("a"), chunks("a"), chunks("b")
    for (ids, labels), (ids2, labels2) in zip(first, again, strict=True):
        assert torch.equal(ids, ids2)
        assert torch.equal(labels, labels2)
        assert ids.shape == labels.shape == (64, 256)
        learned = labels[:, :-1] != IGNORED
        assert torch.equal(labels[:, :-1][learned], ids[:, 1:][learned])
    assert not torch.equal(first[0][0], other[0][0])


def test_the_curriculum_only_widens() -> None:
    mixes = [curriculum(p / 100) for p in range(101)]
    for a, b in itertools.pairwise(mixes):
        assert a.persons <= b.persons
        assert a.lines <= b.lines
        assert a.text_tokens <= b.text_tokens
    assert mixes[-1].persons == almanac.PERSONS


def test_calibration_holds_no_held_out_operands(tmp_path: Path) -> None:
    path = tmp_path / "calibration.jsonl"
    write_calibration(path, count=400)
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert len(lines) == 400
    pairs = [pair for line in lines if (pair := OPERANDS.match(line["completion"]))]
    assert len(pairs) > 100
    assert not any(sums.held_out(pair[2], int(pair[1]), int(pair[3])) for pair in pairs)
