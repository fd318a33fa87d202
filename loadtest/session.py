"""Between Locust and the load: what a process sets up for a run, feeds into Locust's statistics and leaves behind."""

from __future__ import annotations

import gc
import logging
import os
import secrets
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import gevent
import psutil
from gevent.lock import BoundedSemaphore
from locust.env import Environment
from locust.runners import STATE_MISSING, MasterRunner, WorkerRunner

from loadtest import profiles
from loadtest.client import Client
from loadtest.lag import LagMonitor
from loadtest.load import Load
from loadtest.page import Live
from loadtest.profiles import Profile, ProfileError
from loadtest.prompts import Mix, Sizing
from loadtest.records import Record, RecordError, Run, Sample
from loadtest.report import html, summary, write
from loadtest.results import Results
from loadtest.sinks import END, MESSAGE, Collector, Sink, ToMaster, file_of
from loadtest.slo import Slo, SloError
from loadtest.watch import Watch

KEY = "VLLM_API_KEY"
"""Variable of the API key. Never an argument: those are seen by every user of the machine."""
PROGRESS_S, LOOK_S = 5.0, 0.5
COLLECT_S = 15.0
"""A master waits so long for the last lines of workers that it has stopped."""
YOUNG = 20_000
"""Objects in more than there were, until Python looks for cycles among them; 200 streams are a few thousand."""
KEPT, BROKEN, NOT_RUN = 0, 1, 2
"""Exit codes."""

logger = logging.getLogger(__name__)


class Session:
    """A process's part in the runs that Locust starts, one after the other.

    Attributes:
        load: What is being sent; None on a master, on a worker that has no part, and before a run.
        gave_up: The run could not begin, or cannot go on.
        profile: Of the run, or the one that the command line names.
        live: What a master or single process has seen of the run so far.

    Raises:
        ProfileError: The command line names a profile that cannot be run.
        SloError: It names objectives that are none.
    """

    def __init__(self, environment: Environment) -> None:
        self.load: Load | None = None
        self.gave_up = False
        self.live = Live()
        self._environment = environment
        self._options: Any = environment.parsed_options
        self.profile, self._slo = self._read()
        self._lag = LagMonitor()
        self._sink: Sink | None = None
        self._collector: Collector | None = None
        self._watch: Watch | None = None
        self._greenlets: list[gevent.Greenlet[..., None]] = []
        self._stopping = BoundedSemaphore()
        self._folder: Path | None = None
        self._done = self._failed = 0
        if not isinstance(environment.runner, WorkerRunner):
            # Until there is a verdict: Locust's own would be 0 of a run that has not begun.
            environment.process_exit_code = NOT_RUN
        if isinstance(environment.runner, MasterRunner):
            environment.runner.register_message(MESSAGE, self._receive)
        if isinstance(environment.runner, WorkerRunner):
            environment.runner.register_message(END, lambda **_: self.stop())

    def _read(self) -> tuple[Profile, Slo | None]:
        profile = profiles.read(profiles.find(self._options.load_profile))
        return profile, Slo.parse(self._options.slo) if self._options.slo else profile.slo

    @property
    def is_master(self) -> bool:
        """Whether others send."""
        return isinstance(self._environment.runner, MasterRunner)

    @property
    def drained(self) -> bool:
        """Of a master: whether every worker of the run that is still there has sent everything and has all answers."""
        return (
            self._collector is not None and self._present() & self._options.ranks.keys() <= self._collector.ended.keys()
        )

    @property
    def stopping(self) -> bool:
        """Whether `stop` is under way."""
        return bool(self._stopping.locked())

    def start(self) -> None:
        """Looks at the server, opens what lines go to and sends; a master only prepares to collect."""
        try:
            if isinstance(self._environment.runner, WorkerRunner):
                self._join()
            else:
                self._prepare()
        # Locust logs what a listener raises and goes on without it.
        except (ProfileError, SloError, ValueError, OSError, psutil.Error) as error:
            self._give_up(str(error))
        except Exception as error:
            logger.exception("a run could not begin")
            self._give_up(repr(error))

    def _prepare(self) -> None:
        options = self._options
        self._environment.process_exit_code = NOT_RUN
        # Sent to workers with their users, which Locust starts even if nothing comes of the run.
        options.ranks = {}
        self.profile, self._slo = self._read()
        # Beside the option: Locust's page may start several runs, and keeps what the option was.
        options.run = options.run_name or _name(self.profile)
        options.run_salt = options.salt or secrets.token_hex(4)
        self._folder = Path(options.records) / options.run
        self.live = Live()
        if self._folder.exists() and any(self._folder.iterdir()):
            raise ProfileError(f"{self._folder}: holds a run already; choose another --run-name or --records")
        if options.wait_s:
            self._await_server()
        # Of those who are there now, not Locust's numbers: those count every worker that ever was.
        ranks = {node: rank for rank, node in enumerate(sorted(self._present()))}
        if self.profile.traffic.search and len(ranks) > 1:
            raise ProfileError(
                f"{self.profile.name}: a search judges its own records and runs in one process; start one worker"
            )
        options.ranks = ranks
        if self.is_master:
            self._collector = Collector(Path(options.records), self.live)
        else:
            self._begin(0)

    def _join(self) -> None:
        runner: Any = self._environment.runner
        rank = self._options.ranks.get(runner.client_id)
        if rank is None:
            logger.info("this worker has no part in the run: it came too late, or the run could not begin")
            return
        self.profile, self._slo = self._read()
        self._begin(rank)

    def _give_up(self, error: str) -> None:
        self.gave_up = True
        self._environment.process_exit_code = NOT_RUN
        sys.stderr.write(f"loadtest: error: {error}\n")
        if isinstance(self._environment.runner, WorkerRunner):
            self._environment.runner.send_message(MESSAGE, {"error": error})

    def _begin(self, source: int) -> None:
        runner, options, profile = self._environment.runner, self._options, self.profile
        client, cap = self._server()
        sizing = Sizing.of(lambda text: _count(client, text), cap)
        sources = len(options.ranks)
        mix = Mix(profile.parts(sizing, options.run_salt, source / sources), profile.seed, source)
        run = Run(
            run=options.run,
            started_at=time.time(),
            host=self._environment.host or "",
            model=client.model,
            profile=profile.source,
            max_model_len=cap,
            sources=sources,
            source=source,
            server_version=client.version(),
            salt=options.run_salt,
            slo=str(self._slo or ""),
        )
        watched = self._metrics(client) if source == 0 else None
        self._watch = Watch(self._emit, self._lag, watched, options.watch_pid or None)
        if isinstance(runner, WorkerRunner):
            self._sink = ToMaster(runner, run)
        else:
            self._sink = file_of(Path(options.records), run)
        logger.info("profile %s, model %s, cap %s; records: %s", profile.name, client.model, cap, self._folder)
        self._done = self._failed = 0
        load = self.load = Load(profile, client, mix, self.take, slo=self._slo, source=source, sources=sources)
        # What is there stays: a collection that looks at all modules keeps greenlets waiting for tens of milliseconds.
        gc.collect()
        gc.freeze()
        # Requests leave no cycles, but those that found no server. Looking for some every 700 objects held up all
        # answers, for 3 ms at times.
        gc.set_threshold(YOUNG)
        self._lag.start()
        self._watch.start()
        # No user of Locust's sends: it ends users in the middle of an answer when workers come or go.
        sender = gevent.spawn(load.run)
        sender.link_exception(lambda dead: self._give_up(repr(dead.exception)))
        self._greenlets = [sender, gevent.spawn(self._report, load, client)]

    def _server(self) -> tuple[Client, int | None]:
        """A client of the model to load, and the server's cap."""
        host, options = self._environment.host or "", self._options
        key = os.environ.get(KEY) or None
        client = Client(host, options.model or "", key=key, host_header=options.host_header or None, lag=self._lag)
        models = client.models()
        chosen = next((model for model in models if options.model in ("", model)), None)
        if chosen is None:
            listed = ", ".join(models) or "none"
            raise ProfileError(
                f"{host}: /v1/models lists {listed}; check --host and --model, and the key in {KEY} if it has one"
            )
        client.model = chosen
        return client, self.profile.cap or models[chosen]

    def _await_server(self) -> None:
        deadline = time.monotonic() + self._options.wait_s
        while True:
            try:
                self._server()
                return
            except ProfileError:
                if time.monotonic() > deadline:
                    raise
            gevent.sleep(LOOK_S)

    def _metrics(self, client: Client) -> tuple[Client, str] | None:
        """Where the server's metrics are."""
        if not (url := self._options.metrics_url):
            return client, "/metrics"
        if url == "none":
            return None
        parts = urlsplit(url)
        return Client(f"{parts.scheme}://{parts.netloc}", ""), parts.path or "/metrics"

    def stop(self) -> None:
        """Ends a run if one is on; of a master or a single process: reports it. Returns once that is done."""
        # Several ask for it at once: the shape, a signal and Locust's page.
        with self._stopping:
            if self._sink is not None:
                self._end(self._sink, self.load)
            if self._collector is not None:
                self._collect(self._collector)
                self._collector = None
            self.gave_up = False

    def _end(self, sink: Sink, load: Load | None) -> None:
        complete = load is not None and load.ended
        if load is not None and load.under_way:
            logger.info("%d requests were under way and are not in the results", load.under_way)
        gevent.killall(self._greenlets)
        if self._watch is not None:
            self._watch.stop()
        self._lag.stop()
        self.load = self._sink = self._watch = None
        sink.close(complete=complete)
        if self.gave_up:
            return
        if isinstance(self._environment.runner, WorkerRunner):
            self._environment.process_exit_code = KEPT  # the verdict is the master's
        else:
            self._conclude()

    def _collect(self, collector: Collector) -> None:
        assert self._environment.runner
        # At Ctrl-C Locust tells workers to quit only after this. Its own `stop` has them sign off and on again, and
        # those that are between the two are never told.
        for node in collector.sources - collector.ended.keys():
            self._environment.runner.send_message(END, client_id=node)
        with suppress(_TookTooLong), gevent.Timeout(COLLECT_S, _TookTooLong):
            while collector.sources & self._present() - collector.ended.keys():
                gevent.sleep(0.05)
        collector.close()
        if collector.sources and not self.gave_up:
            self._conclude()

    def _present(self) -> set[str]:
        """Workers that have not gone missing; a single process is its own."""
        runner: Any = self._environment.runner
        if not self.is_master:
            return {runner.client_id}
        return {node for node, client in runner.clients.items() if client.state != STATE_MISSING}

    def _conclude(self) -> None:
        assert self._folder
        try:
            results = Results.read(self._folder, self._slo)
            page = write(self._folder, results)
        except (RecordError, OSError) as error:
            self._give_up(str(error))
            return
        sys.stdout.write("\n".join([*summary(results), f"report: {page}", ""]))
        sys.stdout.flush()
        self._environment.process_exit_code = BROKEN if results.failed else KEPT

    def page(self) -> str | None:
        """The report of the run so far, or of the last one; None if there is none."""
        try:
            return html(Results.read(self._folder, self._slo)) if self._folder else None
        except RecordError:
            return None

    def _receive(self, msg: Any, **_: Any) -> None:
        if self._collector is None:
            return
        if error := msg.data.get("error"):
            self._give_up(f"worker {msg.node_id}: {error}")
            return
        try:
            self._collector.take(msg.node_id, msg.data)
        except OSError as error:
            self._give_up(str(error))

    def take(self, record: Record) -> None:
        """Writes a record down, and shows it in Locust's statistics unless it is of the warm-up."""
        self._emit(record)
        if self._environment.web_ui:
            self.live.add(record)
        if record.warm_up:
            return
        self._done += 1
        self._failed += not record.good
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
        if record.gaps_s:
            row = stats.get(record.kind, "ITL")
            for gap in record.gaps_s:
                row.log(round(gap * 1e3), 0)
        if record.tpot_s:
            stats.get(record.kind, "tok/s").log(round(1 / record.tpot_s), 0)

    def _emit(self, line: Record | Sample) -> None:
        if self._sink is not None:
            self._sink.write(line)

    def _report(self, load: Load, client: Client) -> None:
        before, then, told = client.tokens, time.perf_counter(), False
        while not told:
            gevent.sleep(LOOK_S)
            if load.ended and self._sink is not None:
                self._sink.drained()
                told = True
            elif time.perf_counter() - then < PROGRESS_S:
                continue
            now = time.perf_counter()
            rate, lag = (client.tokens - before) / (now - then), self._lag.worst_since(then) or 0.0
            before, then = client.tokens, now
            logger.info(
                "%s: %d under way, %d done, %d failed, %.1f tok/s, client lag %.1f ms",
                *(load.stage, load.under_way, self._done, self._failed, rate, lag * 1e3),
            )


class _TookTooLong(BaseException):
    """No Exception, so that nothing on the way takes it for its own."""


def _name(profile: Profile) -> str:
    return time.strftime(f"{profile.name}-%Y%m%d-%H%M%S", time.gmtime())


def _count(client: Client, text: str) -> int | None:
    found = client.call("/tokenize", {"model": client.model, "prompt": text, "add_special_tokens": False})
    count = found.get("count") if isinstance(found, dict) else None
    return count if isinstance(count, int) else None
