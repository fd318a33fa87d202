"""How long this process keeps ready greenlets waiting: a load test whose client is the bottleneck measures itself."""

from __future__ import annotations

import time
from collections import deque

import gevent

PERIOD_S = 0.01
"""Between two looks: a hundredth of a core's time at most, and waits of a few milliseconds are seen."""
SPAN_S, KEPT = 0.5, 2400
"""Only the worst of each half second is kept, for twenty minutes: asking must not take long itself."""


class LagMonitor:
    """Sleeps for a fixed time over and over; what it oversleeps, others that were ready waited too."""

    def __init__(self) -> None:
        self._seen: deque[tuple[int, float]] = deque(maxlen=KEPT)
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
        """The longest lag in seconds since a `time.perf_counter()`, a span before it included; None if none."""
        worst, first = None, int(moment / SPAN_S)
        for span, lag in reversed(self._seen):
            if span < first:
                break
            worst = lag if worst is None else max(worst, lag)
        return worst

    def _watch(self) -> None:
        while True:
            before = time.perf_counter()
            gevent.sleep(PERIOD_S)
            now = time.perf_counter()
            span, lag = int(now / SPAN_S), max(0.0, now - before - PERIOD_S)
            if self._seen and self._seen[-1][0] == span:
                self._seen[-1] = span, max(lag, self._seen[-1][1])
            else:
                self._seen.append((span, lag))
