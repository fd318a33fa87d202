"""How far a transfer is, as lines for a pod's log."""

from __future__ import annotations

import threading
import time
from collections import deque

_WINDOW = 60.0
"""Seconds that the rate is the mean of."""


class Progress:
    """Counts bytes from several threads.

    Args:
        total: Bytes of everything.
        files: How many there are.
    """

    def __init__(self, total: int, files: int) -> None:
        self.total = total
        self.files = files
        self.here = 0
        self.fetched = 0
        self.done = 0
        self._lock = threading.Lock()
        self._begun = time.monotonic()
        self._seen: deque[tuple[float, int]] = deque([(self._begun, 0)])

    @property
    def seconds(self) -> float:
        """Since the beginning."""
        return time.monotonic() - self._begun

    def found(self, count: int) -> None:
        """Bytes that were there already, or, negative, that were thrown away."""
        with self._lock:
            self.here += count

    def came(self, count: int) -> None:
        """Bytes that came from the source."""
        with self._lock:
            self.here += count
            self.fetched += count

    def finished(self) -> None:
        """One more file is in its place."""
        with self._lock:
            self.done += 1

    def line(self) -> str:
        """Bytes, rate, what is left, and files."""
        with self._lock:
            now = time.monotonic()
            self._seen.append((now, self.fetched))
            while len(self._seen) > 2 and now - self._seen[0][0] > _WINDOW:
                self._seen.popleft()
            (then, before), here, done = self._seen[0], self.here, self.done
            rate = (self.fetched - before) / max(now - then, 1e-3)
        text = f"{far(here, self.total)}, {done} of {self.files} files, {rate / 1e6:,.1f} MB/s"
        return f"{text}, {duration((self.total - here) / rate)} left" if rate > 0 and here < self.total else text


def far(here: int, total: int) -> str:
    """How much of how much is here."""
    return f"{here / 1e9:,.2f} of {total / 1e9:,.2f} GB ({100 * here / max(total, 1):.1f} %)"


def duration(seconds: float) -> str:
    """A time in hours, minutes or seconds."""
    whole = round(seconds)
    if whole >= 3600:
        return f"{whole // 3600} h {whole % 3600 // 60} min"
    return f"{whole // 60} min {whole % 60} s" if whole >= 60 else f"{whole} s"
