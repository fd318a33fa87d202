"""Between Locust and the load: what a process sets up for a run, feeds into Locust's statistics and writes down."""

from __future__ import annotations

import logging
import os
import time
from pathlib import Path
from typing import Any

import gevent
from locust.env import Environment
from locust.runners import MasterRunner, WorkerRunner

from loadtest.client import Client
from loadtest.lag import LagMonitor
from loadtest.load import Load
from loadtest.profiles import Profile, ProfileError
from loadtest.prompts import Mix, Sizing
from loadtest.records import Record, Run, Writer

KEY = "VLLM_API_KEY"
"""Variable of the API key. Never an argument: those are seen by every user of the machine."""
PROGRESS_S = 5.0
DRAINED = "loadtest-drained"
"""Message of a worker that has sent everything and has all answers."""

logger = logging.getLogger(__name__)


class Session:
    """One run in one process.

    Attributes:
        load: What is being sent; None on a master.
        drained: Workers that are done.
    """

    def __init__(self, environment: Environment, profile: Profile) -> None:
        self.load: Load | None = None
        self.drained: set[str] = set()
        self._environment, self.profile = environment, profile
        self._options: Any = environment.parsed_options
        self._lag = LagMonitor()
        self._writer: Writer | None = None
        self._progress: gevent.Greenlet[[], None] | None = None
        self._users = self._done = self._failed = self._tokens = 0

    @property
    def is_master(self) -> bool:
        """Whether others send."""
        return isinstance(self._environment.runner, MasterRunner)

    @property
    def source(self) -> int:
        """Number of this process among those that send."""
        runner = self._environment.runner
        return runner.worker_index if isinstance(runner, WorkerRunner) else 0

    def next_user(self) -> int:
        """Number of a user within this process."""
        self._users += 1
        return self._users - 1

    def start(self) -> None:
        """Looks at the server, opens the file of records and sets the clock.

        Raises:
            ProfileError: Server and profile do not fit together, or no server answers.
        """
        if self.is_master:
            return
        host = self._environment.host or ""
        options = self._options
        key = os.environ.get(KEY) or None
        client = Client(host, options.model or "", key=key, host_header=options.host_header or None, lag=self._lag)
        models = (client.call("/v1/models") or {}).get("data") or []
        chosen = next((model for model in models if options.model in ("", model["id"])), None)
        if chosen is None:
            listed = ", ".join(str(model["id"]) for model in models) or "none"
            raise ProfileError(
                f"{host}: /v1/models lists {listed}; check --host and --model, and the key in {KEY} if it has one"
            )
        client.model = chosen["id"]
        cap = self.profile.cap or chosen.get("max_model_len")
        sizing = Sizing.of(lambda text: _count(client, text), cap)
        mix = Mix(self.profile.parts(sizing), self.profile.seed, self.source)
        run = options.run_name or time.strftime(f"{self.profile.name}-%Y%m%d-%H%M%S", time.gmtime())
        version = (client.call("/version") or {}).get("version")
        head = Run(run, time.time(), host, client.model, self.profile.source, cap, options.sources, version)
        path = Path(options.records) / run / f"records-{self.source}.jsonl"
        try:
            self._writer = Writer(path, head)
        except OSError as cause:
            raise ProfileError(
                f"{path}: cannot be written ({cause}); choose another --run-name or --records"
            ) from cause
        logger.info("profile %s, model %s, cap %s; records go to %s", self.profile.name, client.model, cap, path)
        self.load = Load(self.profile, client, mix, self.take, source=self.source, sources=options.sources)
        self._users = self._done = self._failed = self._tokens = 0
        self._lag.start()
        self.load.start()
        self._progress = gevent.spawn(self._report)

    def stop(self) -> None:
        """Closes what `start` opened; what has been recorded is on the disk already."""
        if self._progress is not None:
            self._progress.kill()
            self._progress = None
        self._lag.stop()
        if self.load is not None and self.load.climb is not None:
            logger.info("saturation: %s", self.load.climb)
            if self.load.climb.held is None:
                self._environment.process_exit_code = 1
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def take(self, record: Record) -> None:
        """Writes a record down, and shows it in Locust's statistics unless it is of the warm-up."""
        if self._writer is not None:
            self._writer.write(record)
        if record.warm_up:
            return
        self._done += 1
        self._failed += not record.good
        self._tokens += record.completion_tokens or 0
        problem = None if record.good else Exception(record.outcome.value)
        self._environment.events.request.fire(
            request_type="e2e",
            name=record.kind,
            response_time=record.e2e_s * 1e3,
            response_length=record.completion_tokens or 0,
            exception=problem,
            context={},
        )
        # Straight into rows of their own: fired as requests, they would count as such in Locust's totals.
        stats = self._environment.stats
        if record.ttft_s is not None:
            stats.get(record.kind, "TTFT").log(round(record.ttft_s * 1e3), 0)
        for gap in record.gaps_s:
            stats.get(record.kind, "ITL").log(round(gap * 1e3), 0)
        if record.tpot_s:
            stats.get(record.kind, "tok/s").log(round(1 / record.tpot_s), 0)

    def _report(self) -> None:
        before, told = self._tokens, False
        while self.load is not None:
            gevent.sleep(PROGRESS_S)
            rate, before = (self._tokens - before) / PROGRESS_S, self._tokens
            load, lag = self.load, self._lag.worst_since(time.perf_counter() - PROGRESS_S) or 0.0
            logger.info(
                "%s: %d under way, %d done, %d failed, %.1f tok/s of answers completed, client lag %.1f ms",
                *(load.stage, load.under_way, self._done, self._failed, rate, lag * 1e3),
            )
            if load.ended and not told and isinstance(self._environment.runner, WorkerRunner):
                self._environment.runner.send_message(DRAINED, {})
                told = True


def _count(client: Client, text: str) -> int | None:
    found = client.call("/tokenize", {"model": client.model, "prompt": text, "add_special_tokens": False})
    return found.get("count") if isinstance(found, dict) else None
