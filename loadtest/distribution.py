"""Latencies as HdrHistogram keeps them: to three significant digits from a microsecond to an hour, and mergeable."""

from __future__ import annotations

from collections.abc import Iterable

from hdrh.histogram import HdrHistogram

LOWEST_US, HIGHEST_US, DIGITS = 1, 3_600_000_000, 3
"""What lies outside is counted as the nearest of the two."""


class Distribution:
    """Durations in seconds, counted by value."""

    def __init__(self, seconds: Iterable[float] = ()) -> None:
        self._histogram = HdrHistogram(LOWEST_US, HIGHEST_US, DIGITS)
        for value in seconds:
            self.add(value)

    def add(self, seconds: float) -> None:
        """Counts one."""
        self._histogram.record_value(min(max(round(seconds * 1e6), LOWEST_US), HIGHEST_US))

    def __len__(self) -> int:
        return int(self._histogram.get_total_count())

    @property
    def mean(self) -> float:
        """In seconds; of the rounded values."""
        return float(self._histogram.get_mean_value()) / 1e6

    @property
    def most(self) -> float:
        """The largest, in seconds."""
        return self.percentile(100)

    def percentile(self, percent: float) -> float:
        """Seconds that so many per cent of the values do not exceed."""
        return float(self._histogram.get_value_at_percentile(percent)) / 1e6

    def encoded(self) -> str:
        """The histogram in HdrHistogram's own compressed form (V2, base64), in microseconds, for any of its readers."""
        text: bytes = self._histogram.encode()
        return text.decode("ascii")
