"""Runs as a load test leaves them, made up: each record follows from a few numbers."""

from __future__ import annotations

import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from loadtest.records import Outcome, Record, Run, Sample, Writer

PROFILE: dict[str, Any] = {"description": "made up", "traffic": {"kind": "open", "rate": 2}}
BEGAN = 1_800_000_000.0


def run(**changes: Any) -> Run:
    fields = {"run": "r", "started_at": BEGAN, "host": "http://h", "model": "glm", "profile": PROFILE}
    return Run(**{**fields, "max_model_len": 4096, **changes})


def answer(at: float, ttft: float = 0.5, gap: float = 0.05, chunks: int = 11, **changes: Any) -> Record:
    """An answer of `chunks` tokens, the first after `ttft`, the others `gap` apart."""
    last = ttft + gap * (chunks - 1)
    fields: dict[str, Any] = {
        "id": f"{at}", "stage": "rate 2", "warm_up": False, "kind": "sum", "language": "en", "api": "chat",
        "reasoning": None, "sent_at": BEGAN + at, "outcome": Outcome.OK, "e2e_s": last, "status": 200, "ttft_s": ttft,
        "first_content_s": ttft, "last_token_s": last, "gaps_s": (gap,) * (chunks - 1),
        "gap_tokens": (1,) * (chunks - 1), "tpot_s": gap, "prompt_tokens": 20, "completion_tokens": chunks,
        "finish_reason": "stop", "correct": True,
    }  # fmt: skip
    return Record(**{**fields, **changes})


def failure(at: float, outcome: Outcome, **changes: Any) -> Record:
    fields: dict[str, Any] = {
        "ttft_s": None,
        "first_content_s": None,
        "last_token_s": None,
        "gaps_s": (),
        "gap_tokens": (),
    }
    fields |= {"tpot_s": None, "prompt_tokens": None, "completion_tokens": None, "correct": None, "e2e_s": 0.01}
    return answer(at, **{**fields, "outcome": outcome, **changes})


def random_answers(seed: int, count: int, *, slower: float = 1.0) -> list[Record]:
    """Answers at two a second whose latencies vary as those of a server do."""
    draw = random.Random(seed)
    made = []
    for i in range(count):
        ttft, gap = slower * draw.lognormvariate(-1, 0.3), slower * draw.lognormvariate(-3, 0.2)
        made.append(answer(i / 2, ttft, gap, draw.randint(5, 40), correct=draw.random() < 0.9))
    return made


def write(folder: Path, records: Iterable[Record], samples: Iterable[Sample] = (), **changes: Any) -> Path:
    head = run(**changes)
    with Writer(folder / f"records-{head.source}.jsonl", head) as writer:
        for record in records:
            writer.write(record)
        for sample in samples:
            writer.write(sample)
    return folder
