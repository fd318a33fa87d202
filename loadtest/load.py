"""Runs a profile's traffic against a client, in greenlets; Locust starts and shows it, and is not needed for it."""

from __future__ import annotations

import random
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import replace

import gevent
from gevent.pool import Group

from loadtest.client import Client, Place
from loadtest.profiles import Profile
from loadtest.prompts import Mix
from loadtest.records import Outcome, Record
from loadtest.shapes import Climb, Stage, arrivals, stage_at
from loadtest.slo import Slo

IDLE_S = 0.05
"""Between two looks of a user who is not wanted now."""


class Load:
    """One process's share of the traffic.

    Args:
        slo: What a search judges by; None takes the profile's.

    Attributes:
        under_way: Requests sent and not yet complete.
        ended: Everything has been sent and answered.
        climb: The search, once it runs.
    """

    def __init__(
        self,
        profile: Profile,
        client: Client,
        mix: Mix,
        emit: Callable[[Record], None],
        *,
        slo: Slo | None = None,
        source: int = 0,
        sources: int = 1,
    ) -> None:
        self.under_way = 0
        self.ended = False
        self.climb: Climb | None = None
        self._profile, self._client, self._mix, self._emit = profile, client, mix, emit
        self._source, self._sources, self._slo = source, sources, slo or profile.slo
        self._number, self._began = 0, time.perf_counter()
        self._judged: list[Record] = []
        self._pauses = random.Random(f"think/{profile.seed}/{source}")

    @property
    def elapsed(self) -> float:
        """Seconds since the start."""
        return time.perf_counter() - self._began

    @property
    def stage(self) -> str:
        """What is on now, in words."""
        if self.climb:
            return f"search, {self.climb.next_rate() or 0:g} requests/s"
        stage = stage_at(self._profile.traffic.stages, self.elapsed)
        return stage.name if stage else "waiting for answers"

    def run(self) -> None:
        """Sends everything, and returns once the last request is answered."""
        self._began = time.perf_counter()
        traffic = self._profile.traffic
        if traffic.is_open:
            self._open(traffic.stages, self._profile.seed)
            if traffic.search:
                self._climb()
        else:
            self._closed(traffic.stages)
        self.ended = True

    def _closed(self, stages: Sequence[Stage]) -> None:
        most = self._share(max(stage.users or 0 for stage in stages))
        users = [gevent.spawn(self._user, index) for index in range(most)]
        try:
            gevent.joinall(users, raise_error=True)
        finally:
            gevent.killall(users)

    def _user(self, index: int) -> None:
        traffic = self._profile.traffic
        seconds = sum(stage.seconds for stage in traffic.stages)
        while stage := stage_at(traffic.stages, self.elapsed):
            if index >= self._share(stage.users or 0):
                gevent.sleep(IDLE_S)
                continue
            self.under_way += 1
            self._counted(Place(stage.name, stage.warm_up), self._next())
            if traffic.think_s:
                pause = self._pauses.expovariate(1 / traffic.think_s)
                gevent.sleep(max(0.0, min(pause, seconds - self.elapsed)))

    def _climb(self) -> None:
        search, slo = self._profile.traffic.search, self._slo
        assert search
        assert slo
        self.climb = Climb(search)
        step = 0
        while (rate := self.climb.next_rate()) is not None:
            step += 1
            settling = [Stage(search.settle, rate=rate, warm_up=True)] if search.settle else []
            self._judged = []
            self._open([*settling, Stage(search.seconds - search.settle, rate=rate)], self._profile.seed + step)
            self.climb.tell(rate, held=not slo.broken(self._judged))

    def _open(self, stages: Sequence[Stage], seed: int) -> None:
        began, sent = time.perf_counter(), Group()
        try:
            for arrival in arrivals(stages, seed, self._source, self._sources):
                gevent.sleep(max(0.0, began + arrival.at - time.perf_counter()))
                place, number = Place(arrival.stage.name, arrival.stage.warm_up), self._next()
                if self.under_way >= self._profile.traffic.most_under_way:
                    self._give_up(place, number, began + arrival.at)
                else:
                    # Counted here: a greenlet counts itself only once it runs.
                    self.under_way += 1
                    sent.start(gevent.Greenlet(self._counted, place, number, began + arrival.at))
            gevent.sleep(max(0.0, began + sum(stage.seconds for stage in stages) - time.perf_counter()))
            sent.join()
        finally:
            sent.kill()

    def _next(self) -> int:
        self._number += 1
        return self._number - 1

    def _share(self, users: int) -> int:
        return users // self._sources + (self._source < users % self._sources)

    def _counted(self, place: Place, number: int, due: float | None = None) -> None:
        try:
            prompt = self._mix.draw(number)
            if due is not None:
                # Only now: a greenlet may have waited for others, and has made its prompt.
                place = replace(place, dispatch_lag_s=time.perf_counter() - due)
            record = self._client.ask(prompt, self._profile.options, place)
        finally:
            self.under_way -= 1
        self._done(record)

    def _give_up(self, place: Place, number: int, due: float) -> None:
        prompt, options = self._mix.draw(number), self._profile.options
        record = Record(
            id=uuid.uuid4().hex,
            stage=place.stage,
            warm_up=place.warm_up,
            kind=prompt.kind,
            language=prompt.language,
            api=options.api,
            reasoning=options.reasoning,
            sent_at=time.time(),
            outcome=Outcome.NOT_SENT,
            expected=prompt.expected,
            detail=f"{self.under_way} requests under way; raise `most_under_way` or spread the load over more workers",
            dispatch_lag_s=time.perf_counter() - due,
            wanted_tokens=prompt.wanted_tokens,
        )
        self._done(record)

    def _done(self, record: Record) -> None:
        if self.climb and not record.warm_up:
            self._judged.append(record)
        self._emit(record)
