"""How long this process keeps ready greenlets waiting: a load test whose client is the bottleneck measures itself."""

from __future__ import annotations

import time
from collections import deque

import gevent

PERIOD_S = 0.01
"""Between two looks: a hundredth of a core's time at most, and waits of a few milliseconds are seen."""
KEPT = 60_000
"""Looks kept: ten minutes."""


class LagMonitor:
    """Sleeps for a fixed time over and over; what it oversleeps, others that were ready waited too."""

    def __init__(self) -> None:
        self._seen: deque[tuple[float, float]] = deque(maxlen=KEPT)
        self._watching: gevent.Greenlet[[], None] | None = None

    def start(self) -> None:
        """Begins to watch; does nothing if it does already."""
        if self._watching is None:
            self._watching = gevent.spawn(self._watch)

    def stop(self) -> None:
        """Ends watching."""
        if self._watching is not None:
            self._watching.kill()
            self._watching = None

    def worst_since(self, moment: float) -> float | None:
        """The longest lag in seconds since a `time.perf_counter()`; None if nothing was seen since."""
        worst = None
        for seen_at, lag in reversed(self._seen):
            if seen_at < moment:
                break
            worst = lag if worst is None else max(worst, lag)
        return worst

    def _watch(self) -> None:
        while True:
            before = time.perf_counter()
            gevent.sleep(PERIOD_S)
            now = time.perf_counter()
            self._seen.append((now, max(0.0, now - before - PERIOD_S)))
