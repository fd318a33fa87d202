"""Training data of the demo model: items rendered as chats, packed into rows, as endless seeded streams.

Nothing is stored; every row is drawn anew. Held-out operands never appear (`vqserve.evaluate.sums.held_out`).
"""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.utils.data import IterableDataset, get_worker_info

from tokenizer import SYSTEM_PROMPTS, build
from vqserve.evaluate import almanac, needle, sums
from vqserve.evaluate.items import Item

LINE_TOKENS, TURN_TOKENS = 11, 50
"""Tokens of a text's filler line (a needle has one more), and an upper bound for one question with its answer."""
IGNORED = -100
CHUNK_TOKENS = 16_384

Chat = tuple[list[int], list[int]]
"""Token ids, and the same ids where the model is to learn them, `IGNORED` elsewhere."""


BEGIN = "[gMASK]<sop>"


def prompt_text(item: Item, *, thinking: bool, system: str | None = None) -> str:
    """What a server's chat template makes of this question (tests/demo compares the two)."""
    head = BEGIN + (f"<|system|>{system}" if system else "")
    return f"{head}<|user|>{item.question}<|assistant|>{'<think>' if thinking else '</think>'}"


def answer_text(item: Item, *, thinking: bool) -> str:
    """What the model is to write, ended by the token that hands over to the user."""
    return item.answered(thinking=thinking) + "<|user|>"


@dataclass(frozen=True)
class Mix:
    """What the samples are drawn from at one moment of the training.

    Attributes:
        persons: How much of the almanac is asked for.
        facts: Share of facts in ordinary rows.
        lookups: Share of look-ups in short texts in ordinary rows; the rest are sums.
        lines: Most lines of a short text.
        text_tokens: Most tokens of a text in the long rows, its questions and answers included.
    """

    persons: int
    facts: float
    lookups: float
    lines: int
    text_tokens: int


def ramp(progress: float, begin: float, end: float, low: float, high: float) -> float:
    """`low` until `begin`, `high` from `end` on, linear in between."""
    return low + (high - low) * min(1.0, max(0.0, (progress - begin) / (end - begin)))


def curriculum(progress: float) -> Mix:
    """The mix after this share of the training.

    Recall and look-up begin with a plateau whose length grows with the number of persons and of lines. On few, the
    circuits form within a few hundred steps, and then extend (for facts: Zucchet et al. 2025, arXiv 2503.21676). From
    the start on 20,000 persons and 2 to 11 lines, 5,400 steps of 262,144 tokens taught neither; widened at one stroke
    from 2,000 to 20,000 persons, the model forgot those it knew.
    """
    return Mix(
        persons=int(ramp(progress, 0.06, 0.5, 500, almanac.PERSONS)),
        facts=0.5,
        lookups=ramp(progress, 0.12, 0.2, 0.2, 0.1),
        lines=int(ramp(progress, 0.05, 0.15, 4, 10)),
        text_tokens=int(ramp(progress, 0.12, 0.5, 512, 4096)),
    )


class Renderer:
    """Turns items into token ids and labels."""

    def __init__(self) -> None:
        self.tokenizer = build()

    def _join(self, parts: list[tuple[str, bool]]) -> Chat:
        ids: list[int] = []
        labels: list[int] = []
        for text, learned in parts:
            part = self.tokenizer.encode(text, add_special_tokens=False).ids
            ids += part
            labels += part if learned else [IGNORED] * len(part)
        return ids, labels

    def chat(self, item: Item, *, thinking: bool, system: str | None = None) -> Chat:
        """One question and its answer."""
        prompt = prompt_text(item, thinking=thinking, system=system)
        return self._join([(prompt, False), (answer_text(item, thinking=thinking), True)])

    def turns(self, items: list[Item]) -> Chat:
        """Several questions about one text as the turns of one chat, answered directly."""
        parts = [(f"{BEGIN}<|user|>", False)]
        for item in items:
            parts += [(f"{item.question}<|assistant|></think>", False), (answer_text(item, thinking=False), True)]
        return self._join(parts)


def ordinary(rng: random.Random, render: Renderer, mix: Mix) -> Chat:
    """A fact, a sum or a look-up in a short text, with or without thinking."""
    kind, thinking = rng.random(), rng.random() < 0.5
    system = rng.choice(SYSTEM_PROMPTS) if rng.random() < 0.05 else None
    if kind < mix.facts:
        return render.chat(almanac.sample(rng, persons=mix.persons), thinking=thinking, system=system)
    if kind >= mix.facts + mix.lookups:
        return render.chat(sums.sample(rng, test=False), thinking=thinking, system=system)
    lines = rng.randint(2, mix.lines)
    if rng.random() < 0.3:
        return render.chat(needle.sample(rng, lines)[0], thinking=thinking, system=system)
    return render.turns(needle.sample(rng, lines, asked=3))


def long_text(rng: random.Random, render: Renderer, mix: Mix) -> Chat:
    """A text of a quarter to all of `mix.text_tokens`, half of them close to the full length, and some questions.

    Three in ten carry one question only: several take so much room that the text never comes close to the full length.
    """
    single = rng.random() < 0.3
    asked = 1 if single else min(rng.choice([2, 4, needle.MOST_NEEDLES]), mix.text_tokens // 128)
    most = (mix.text_tokens - (asked + 1) * TURN_TOKENS) // LINE_TOKENS
    lines = rng.randint(most // 4, most) if rng.random() < 0.5 else most - rng.randrange(most // 8)
    items = needle.sample(rng, lines, asked=asked)
    return render.chat(items[0], thinking=rng.random() < 0.5) if single else render.turns(items)


class Rows(IterableDataset[tuple[torch.Tensor, torch.Tensor]]):
    """Chunks of rows, int16 ids and labels `[CHUNK_TOKENS // length, length]`; labels are shifted by one.

    A row holds whole chats, one after the other, as many as fit.
    """

    def __init__(
        self, draw: Callable[[random.Random, Renderer, Mix], Chat], *, length: int, tokens: int, start: float, seed: str
    ) -> None:
        """Endless rows whose mix follows the curriculum.

        Args:
            draw: `ordinary` or `long_text`.
            length: Tokens of a row.
            tokens: How many tokens of such rows the whole training reads.
            start: Share of the training at which these rows begin.
            seed: Seed of the draws.
        """
        self.draw, self.length, self.tokens, self.start, self.seed = draw, length, tokens, start, seed

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        rng = random.Random(f"{self.seed}/{worker}")
        render, waiting = Renderer(), None
        for chunk in itertools.count(worker, workers):
            mix = curriculum(self.start + (1 - self.start) * min(1.0, chunk * CHUNK_TOKENS / self.tokens))
            rows = []
            for _ in range(CHUNK_TOKENS // self.length):
                ids: list[int] = []
                labels: list[int] = []
                while len(ids) <= self.length:
                    chat = waiting or self.draw(rng, render, mix)
                    waiting = None
                    if ids and len(ids) + len(chat[0]) > self.length + 1:
                        waiting = chat
                        break
                    ids += chat[0]
                    labels += chat[1]
                pad = self.length + 1 - len(ids)
                rows.append((ids[: self.length + 1] + [0] * pad, labels[: self.length + 1] + [IGNORED] * pad))
            ids16, labels16 = (torch.tensor(part, dtype=torch.int16) for part in zip(*rows, strict=True))
            yield ids16[:, :-1].clone(), labels16[:, 1:].clone()


def write_calibration(path: Path, *, count: int = 1024, seed: int = 11) -> None:
    """Write calibration chats, one JSON object of `prompt` and `completion` per line: training operands only."""
    rng, mix = random.Random(seed), curriculum(1.0)
    with path.open("w", encoding="utf-8") as file:
        for i in range(count):
            draw, thinking = rng.random(), i % 2 == 0
            if draw < mix.facts:
                item = almanac.sample(rng)
            elif draw < mix.facts + mix.lookups:
                item = needle.sample(rng, rng.randint(2, 40))[0]
            else:
                item = sums.sample(rng, test=False)
            line = {"prompt": prompt_text(item, thinking=thinking), "completion": answer_text(item, thinking=thinking)}
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
