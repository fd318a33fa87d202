"""How requests arrive: closed loops of users, seeded Poisson arrivals, stages of either, and the search for saturation.

In an open loop slow answers do not keep others from being sent. Locust's `constant_pacing` and `constant_throughput` do
not give that: a user waits for its answer before it sends the next request.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

WARM_UP = "warm-up"


@dataclass(frozen=True)
class Stage:
    """Traffic of one kind for some time; exactly one of `users` and `rate` is set.

    Attributes:
        seconds: How long.
        users: Users of a closed loop, each with one request under way.
        rate: Requests per second of an open loop, of all sources together.
        warm_up: Leave its requests out of all results.
        turn: Which of the stages of this level it is: calm before a spike is not calm after it.
    """

    seconds: float
    users: int | None = None
    rate: float | None = None
    warm_up: bool = False
    turn: int = 1

    @property
    def name(self) -> str:
        """What results are broken down by."""
        if self.warm_up:
            return WARM_UP
        level = f"users {self.users}" if self.users is not None else f"rate {self.rate:g}"
        return level if self.turn == 1 else f"{level} ({self.turn})"


@dataclass(frozen=True)
class Search:
    """Rates to try for the largest that keeps an SLO: up by a factor until it breaks, then between the two.

    Attributes:
        start: First rate, requests per second.
        factor: From one rate to the next, above 1.
        most: Highest rate tried.
        refine: Halvings of the gap between the last rate that held and the first that did not.
        seconds: Each rate is kept for.
        settle: Seconds at the beginning of each that are not judged.
    """

    start: float
    factor: float
    most: float
    refine: int
    seconds: float
    settle: float


class Climb:
    """A search under way.

    Attributes:
        held: Largest rate that held; None if none has.
        broke: Smallest rate that did not; None if none has.
    """

    def __init__(self, search: Search) -> None:
        self.held: float | None = None
        self.broke: float | None = None
        self._search, self._halvings = search, search.refine

    def next_rate(self) -> float | None:
        """The rate to try now; None if the search is over."""
        if self.broke is None:
            if self.held is None:
                return self._search.start
            return None if self.held >= self._search.most else min(self.held * self._search.factor, self._search.most)
        if self.held is None or self._halvings == 0:
            return None
        return (self.held + self.broke) / 2

    def tell(self, rate: float, *, held: bool) -> None:
        """Says whether a rate held."""
        if self.broke is not None:
            self._halvings -= 1
        if held:
            self.held = rate
        else:
            self.broke = rate


@dataclass(frozen=True)
class Arrival:
    """When to send a request.

    Attributes:
        at: Seconds from the beginning.
        stage: The stage it belongs to.
    """

    at: float
    stage: Stage


def arrivals(stages: Iterable[Stage], seed: int, source: int = 0, sources: int = 1) -> Iterator[Arrival]:
    """Poisson arrivals of one source of several: together they are Poisson at the stages' rates.

    Raises:
        ValueError: A stage has no rate.
    """
    rng, begin, due = random.Random(f"arrivals/{seed}/{source}"), 0.0, 0.0
    waited = rng.expovariate(1.0)
    for stage in stages:
        if stage.rate is None:
            raise ValueError(f"stage `{stage.name}` has users, not a rate")
        end, rate = begin + stage.seconds, stage.rate / sources
        due = begin
        # The exponential time left over goes on into the next stage at its rate: a stage's end makes no gap.
        while rate > 0 and due + waited / rate < end:
            due += waited / rate
            yield Arrival(due, stage)
            waited = rng.expovariate(1.0)
        waited -= (end - due) * rate
        begin = end


def stage_at(stages: Sequence[Stage], elapsed: float) -> Stage | None:
    """The stage that is on after so many seconds; None after the last."""
    for stage in stages:
        if elapsed < stage.seconds:
            return stage
        elapsed -= stage.seconds
    return None
