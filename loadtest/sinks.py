"""Where a process's lines go: into its own file, or from a worker to the master, which writes them."""

from __future__ import annotations

import logging
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import gevent
from locust.runners import WorkerRunner

from loadtest.page import Live
from loadtest.records import Record, Run, Sample, Writer, record_of, run_of, sample_of

MESSAGE = "loadtest"
"""Of a worker to the master: the head of its run, lines, and how it ended; or why it could not begin."""
END = "loadtest-end"
"""Of the master to a worker: send nothing more, and what is left of the lines."""
PERIOD_S = 1.0

logger = logging.getLogger(__name__)


class Sink(Protocol):
    """Takes the lines of one process."""

    def write(self, line: Record | Sample) -> None:
        """Takes one."""

    def drained(self) -> None:
        """Says that all requests have ended."""

    def close(self, *, complete: bool) -> None:
        """No line will follow; `complete`: all requests had ended."""


class File(Writer):
    """A file of this process."""

    def drained(self) -> None:
        """Nobody waits for it."""


def file_of(folder: Path, run: Run) -> File:
    """The file of a process.

    Raises:
        OSError: It exists, or cannot be written.
    """
    return File(folder / run.run / f"records-{run.source}.jsonl", run)


class ToMaster:
    """Sends lines to the master every second."""

    def __init__(self, runner: WorkerRunner, run: Run) -> None:
        self._runner, self._head = runner, asdict(run)
        self._lines: list[dict[str, Any]] = []
        self._complete: bool | None = None
        self._flush()
        self._greenlet = gevent.spawn(self._go)

    def write(self, line: Record | Sample) -> None:
        """Keeps a line for the next message."""
        self._lines.append(dict(vars(line)))

    def drained(self) -> None:
        """Sends what is left, and that it is all."""
        self._complete = True
        self._flush()

    def close(self, *, complete: bool) -> None:
        """Sends what is left, and that no more will come."""
        self._greenlet.kill()
        self._complete = complete
        self._flush()

    def _go(self) -> None:
        while True:
            gevent.sleep(PERIOD_S)
            self._flush()

    def _flush(self) -> None:
        lines, self._lines = self._lines, []
        self._runner.send_message(MESSAGE, {"run": self._head, "lines": lines, "complete": self._complete})


class Collector:
    """The master's side: writes what the workers send, a file for each, and shows it.

    Attributes:
        ended: Workers that send no more requests, by node, and whether all of theirs had ended.
    """

    def __init__(self, folder: Path, live: Live) -> None:
        self.ended: dict[str, bool] = {}
        self._folder, self._live, self._files = folder, live, dict[str, File]()

    @property
    def sources(self) -> set[str]:
        """Workers that have begun, by node."""
        return set(self._files)

    def take(self, node: str, data: dict[str, Any]) -> None:
        """Takes a message.

        Raises:
            OSError: A file cannot be written.
        """
        if node not in self._files:
            self._files[node] = file_of(self._folder, run_of(data["run"]))
        for line in data["lines"]:
            made = record_of(line) if "outcome" in line else sample_of(line)
            self._files[node].write(made)
            if isinstance(made, Record):
                self._live.add(made)
        if data["complete"] is not None:
            self.ended[node] = data["complete"]

    def close(self) -> None:
        """Closes the files; those of workers that did not come to their end remain incomplete."""
        for node, file in self._files.items():
            file.close(complete=self.ended.get(node, False))
