"""The anti-repetition penalty for a batch against its plain definition."""

from __future__ import annotations

import random
import time

import pytest
import torch

from vqserve.reference import repetition as reference
from vqserve.settings import AntiRepetition
from vqserve.vllm_plugin.repetition import LONGEST, match_lengths, penalise, repeats

WINDOW = 96
VOCABULARY = 20


def random_output(draw: random.Random) -> list[int]:
    """Text of a small vocabulary, with loops and copies in it, shorter or longer than the window."""
    out: list[int] = []
    length = draw.choice((0, 1, 5, 50, 200))
    while len(out) < length:
        if out and draw.random() < 0.4:
            start = draw.randrange(len(out))
            out += out[start : start + draw.randint(1, 30)] * draw.choice((1, 1, 2, 30))
        else:
            out += draw.choices(range(VOCABULARY), k=draw.randint(1, 10))
    return out


def right_aligned(outputs: list[list[int]], width: int) -> torch.Tensor:
    rows = torch.full((len(outputs), width), -1)
    for row, out in zip(rows, outputs, strict=True):
        if out:
            row[-len(out[-width:]) :] = torch.tensor(out[-width:])
    return rows


def test_the_batch_is_penalised_as_the_definition_says(seed: int) -> None:
    draw = random.Random(seed)
    outputs = [random_output(draw) for _ in range(200)]
    strengths = [draw.uniform(0, 2) for _ in outputs]
    lengths = [draw.randint(1, 20) for _ in outputs]
    logits = torch.randn(len(outputs), VOCABULARY, generator=torch.Generator().manual_seed(seed))
    # The last would go on with its loop but for the penalty.
    outputs[-1], strengths[-1], lengths[-1], logits[-1, 0] = [0, 1] * WINDOW, 1.0, 2, 100.0
    wanted, steered = logits.clone(), []
    for row, out, strength, length in zip(wanted, outputs, strengths, lengths, strict=True):
        found = reference.penalties(out, strength=strength, min_length=length, window=WINDOW, longest=LONGEST)
        steered.append(found.get(int(row.argmax()), 0) > 0)
        for token, cost in found.items():
            row[token] -= cost
    hit = penalise(logits, right_aligned(outputs, WINDOW), torch.tensor(strengths), torch.tensor(lengths))
    torch.testing.assert_close(logits, wanted)
    assert hit.tolist() == steered
    assert steered[-1]


def test_a_repetition_is_counted_up_to_its_longest(seed: int) -> None:
    draw = random.Random(seed)
    for _ in range(40):
        recent, longest = right_aligned([[0, *random_output(draw)]], WINDOW), draw.randint(1, WINDOW)
        whole = match_lengths(recent, WINDOW + 1)
        assert torch.equal(match_lengths(recent, longest), whole.clamp(max=longest))
        assert repeats(recent[0], longest) == bool((whole >= longest).any())


def test_a_token_that_is_ruled_out_stays_so() -> None:
    logits = torch.full((1, 5), -torch.inf)
    penalise(logits, torch.ones(1, 50, dtype=torch.int64), torch.ones(1), torch.ones(1))
    assert logits.isneginf().all()


def test_a_row_without_tokens_and_a_strength_of_zero_change_nothing() -> None:
    logits = torch.randn(2, 5)
    before = logits.clone()
    recent = torch.stack([torch.full((50,), -1), torch.ones(50, dtype=torch.int64)])
    hit = penalise(logits, recent, torch.tensor([1.0, 0.0]), torch.ones(2))
    assert torch.equal(logits, before)
    assert not hit.any()


@pytest.mark.parametrize(
    "text",
    [
        "111 + 111 = 222",
        "11 × 11 = 121",
        "1000000 × 1000000 = 1000000000000",
        "1111 × 11: 1111×1: 1×1=1 1×1=1 1×1=1 1×1=1 → 1111\n1111×1: 1×1=1 1×1=1 1×1=1 1×1=1 → 1111",
    ],
)
def test_repeated_digits_of_a_sum_cost_nothing(text: str) -> None:
    out = [ord(char) for char in text]  # a token per digit: the worst case
    for n in range(len(out)):
        assert not reference.penalties(
            out[:n], strength=1.0, min_length=AntiRepetition(1).min_length, window=2048, longest=LONGEST
        )


def test_the_cost_per_token_is_small() -> None:
    """A row that repeats nothing, and one in a loop; loose, since machines stall."""
    recent = torch.randint(150_000, (2048,), dtype=torch.int32, generator=torch.Generator().manual_seed(0))
    logits = torch.randn(1, 150_000)
    one, length = torch.ones(1), torch.tensor([64])
    looking = _median_us(lambda: repeats(recent, 64))
    paying = _median_us(lambda: penalise(logits, recent[None], one, length))
    print(f"per token, window 2048: {looking:.0f} us to look for repetitions, {paying:.0f} us more in one")  # noqa: T201
    assert looking < 2_000
    assert paying < 20_000


def _median_us(call: object, times: int = 30) -> float:
    assert callable(call)
    spans = []
    for _ in range(times):
        start = time.perf_counter()
        call()
        spans.append(time.perf_counter() - start)
    return sorted(spans)[times // 2] * 1e6
