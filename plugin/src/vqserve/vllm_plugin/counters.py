"""What the safety nets count, from the engine's processes to /metrics.

Logits processors run in the engine; vLLM's API server, which answers `/metrics`, is another process, and between the
two there is no channel for numbers of ours. So `vqserve serve` makes an anonymous file in memory before it becomes the
API server, and names it to the engine by a path in the environment: `/proc/PID/fd/N`. Nothing is left behind when the
server ends, however it ends. Each engine of data parallelism has a row of its own, written by its first rank alone, so
no two processes write the same number, and each number is one aligned word, which a reader sees whole.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from prometheus_client.core import CounterMetricFamily
from prometheus_client.registry import Collector

from vqserve.format.errors import UsageError
from vqserve.settings import COUNTERS, COUNTERS_BYTES

NAMES = ("vqserve_thinking_closed", "vqserve_anti_repetition_tokens")
"""Of the counters, in their order in a row; Prometheus adds `_total`."""
THINKING_CLOSED, STEERED = range(len(NAMES))

_TEXTS = (
    "Requests whose thinking reached its budget and was closed.",
    "Generated tokens at which the likeliest token would have prolonged a repetition and was penalised.",
)
_WORD = 8


class Counters:
    """The counters of one engine. Without a file they are counted, and nobody sees them.

    Args:
        engine: Which of the engines of data parallelism, from 0.
        path: The file; what `COUNTERS` says if left out.

    Raises:
        UsageError: The file cannot be opened, or has no room for this engine.
    """

    def __init__(self, engine: int, path: str | None = None) -> None:
        path = os.environ.get(COUNTERS) if path is None else path
        self._first = engine * len(NAMES)
        if path:
            self._words = _words(path)
            if self._first + len(NAMES) > len(self._words):
                raise UsageError(f"{COUNTERS}={path}: no room for engine {engine}; unset it to count nothing")
        else:
            self._words = memoryview(bytearray((self._first + len(NAMES)) * _WORD)).cast("q")

    def add(self, counter: int, number: int) -> None:
        """Adds to one of `THINKING_CLOSED` and `STEERED`."""
        self._words[self._first + counter] += number

    def set(self, counter: int, number: int) -> None:
        """Sets one of them, which is not to fall."""
        self._words[self._first + counter] = number

    def values(self) -> list[int]:
        """All of them, as a scrape reads them."""
        return self._words[self._first : self._first + len(NAMES)].tolist()


class NetsCollector(Collector):
    """Reads the counters whenever Prometheus asks."""

    def __init__(self, model_name: str, engines: Sequence[int], path: str) -> None:
        self._model_name = model_name
        self._counters = {str(engine): Counters(engine, path) for engine in engines}

    def collect(self) -> Iterable[CounterMetricFamily]:
        values = {engine: counters.values() for engine, counters in self._counters.items()}
        for index, (name, text) in enumerate(zip(NAMES, _TEXTS, strict=True)):
            family = CounterMetricFamily(name, text, labels=("model_name", "engine"))
            for engine, row in values.items():
                family.add_metric((self._model_name, engine), row[index])
            yield family


def collector(model_name: str, engines: Sequence[int] = (0,)) -> NetsCollector | None:
    """What to register in the API server's registry; None if nothing is counted.

    Args:
        model_name: As vLLM's own metrics say it.
        engines: The engines of data parallelism, by vLLM's indices.

    Raises:
        UsageError: `COUNTERS` names no such file.
    """
    path = os.environ.get(COUNTERS)
    return NetsCollector(model_name, engines, path) if path else None


def _words(path: str) -> memoryview:
    try:
        with Path(path).open("r+b") as file:
            return memoryview(mmap.mmap(file.fileno(), COUNTERS_BYTES)).cast("q")
    except (OSError, ValueError) as error:
        raise UsageError(f"{COUNTERS}={path}: {error}; unset it to count nothing") from error
