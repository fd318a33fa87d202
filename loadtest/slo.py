"""Service level objectives: what a load test's exit code, goodput and search for saturation judge by."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Self

import numpy as np

from loadtest.records import Outcome, Record

LATENCIES = {"ttft_s": "TTFT", "first_content_s": "first content", "itl_s": "ITL", "tpot_s": "TPOT", "e2e_s": "e2e"}


class SloError(ValueError):
    """An objective that is none; says which and what to do."""


@dataclass(frozen=True)
class Slo:
    """What traffic has to keep; None asks nothing.

    Attributes:
        ttft_s: Limit of the given percentile of the time to the first token.
        first_content_s: Of the time to the first token that is not reasoning.
        itl_s: Of the gaps between chunks.
        tpot_s: Of the time per token after the first chunk.
        e2e_s: Of whole requests.
        failures: Largest share of requests that may end otherwise than expected.
        correct: Smallest share of right answers among those whose right answer is known.
        percentile: Of the limits above, in (0, 100].

    Raises:
        SloError: A number is out of range.
    """

    ttft_s: float | None = None
    first_content_s: float | None = None
    itl_s: float | None = None
    tpot_s: float | None = None
    e2e_s: float | None = None
    failures: float = 0.0
    correct: float | None = None
    percentile: float = 90.0

    def __post_init__(self) -> None:
        for name in LATENCIES:
            limit = getattr(self, name)
            if limit is not None and not (math.isfinite(limit) and limit > 0):
                raise SloError(f"`{name}`: expected seconds above 0, found {limit}")
        for name in ("failures", "correct"):
            share = getattr(self, name)
            if share is not None and not 0 <= share <= 1:
                raise SloError(f"`{name}`: expected a share from 0 to 1, found {share}")
        if not 0 < self.percentile <= 100:
            raise SloError(f"`percentile`: expected above 0 and at most 100, found {self.percentile}")

    @classmethod
    def parse(cls, text: str) -> Self:
        """Reads `ttft_s=2,tpot_s=0.05,failures=0.01,percentile=95`.

        Raises:
            SloError: It is not of that form.
        """
        names = [field.name for field in fields(cls)]
        values: dict[str, float] = {}
        for entry in filter(None, (part.strip() for part in text.split(","))):
            name, equals, number = (part.strip() for part in entry.partition("="))
            if not equals or name not in names:
                raise SloError(f"`{entry}`: expected NAME=NUMBER with one of {', '.join(names)}")
            if name in values:
                raise SloError(f"`{name}`: given twice; leave one")
            try:
                values[name] = float(number)
            except ValueError:
                raise SloError(f"`{name}`: expected a number, found `{number}`") from None
        if not values:
            raise SloError("no objective; name one, such as ttft_s=2")
        return cls(**values)

    def __str__(self) -> str:
        given = [(field.name, getattr(self, field.name)) for field in fields(self)]
        return ",".join(f"{name}={value:.12g}" for name, value in given if value is not None)

    def met(self, record: Record) -> bool:
        """Whether one request keeps it by itself, which is what goodput counts: its gaps by their own percentile.

        An answer whose limited latency was not measured does not; one of a single chunk keeps any ITL and TPOT.
        """
        if not record.good or (self.correct is not None and record.correct is False):
            return False
        for name in LATENCIES:
            limit = getattr(self, name)
            if limit is None:
                continue
            values = _values(name, record)
            percent = self.percentile if name == "itl_s" else 100
            if values is None or (values and _percentile(values, percent) > limit):
                return False
        return True

    def broken(self, records: Sequence[Record]) -> list[str]:
        """Why these requests do not keep it, in words; empty if they do."""
        if not records:
            return ["no request ended"]
        good = [record for record in records if record.good]
        share = (len(records) - len(good)) / len(records)
        reasons = [] if share <= self.failures else [f"{share:.1%} failed, {self.failures:.1%} allowed"]
        for name, title in LATENCIES.items():
            if (limit := getattr(self, name)) is None:
                continue
            found = [value for record in good for value in _values(name, record) or ()]
            if not found:
                reasons.append(f"no {title} was measured, {limit:g} s allowed")
            elif (value := _percentile(found, self.percentile)) > limit:
                digits = 3 if round(value, 3) > limit else 6
                reasons.append(f"{title} p{self.percentile:g} {value:.{digits}f} s, {limit:g} s allowed")
        judged = [record.correct for record in good if record.correct is not None]
        if self.correct is not None and (not judged or sum(judged) / len(judged) < self.correct):
            right = f"{sum(judged) / len(judged):.1%} of {len(judged)} answers right" if judged else "no answer judged"
            reasons.append(f"{right}, {self.correct:.1%} wanted")
        return reasons


def _percentile(values: Sequence[float], percent: float) -> float:
    # Not a histogram's, which rounds up beyond limits that are kept.
    return float(np.percentile(values, percent, method="inverted_cdf"))


def _values(name: str, record: Record) -> Sequence[float] | None:
    """None if an answer should have one and it was not measured."""
    if record.outcome != Outcome.OK:
        return ()  # a deliberate refusal is good, and has no latency of an answer
    if name == "itl_s":
        return record.gaps_s
    value = getattr(record, name)
    if value is None:
        return () if name == "tpot_s" and not record.gaps_s else None
    return (value,)
