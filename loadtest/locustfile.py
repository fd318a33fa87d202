"""What Locust loads: `python -m loadtest --host http://127.0.0.1:8001 --load-profile smoke`.

Its statistics have a row per kind of prompt for e2e, TTFT and ITL in milliseconds (where the latter two count first
chunks and gaps as requests), and for `tok/s`, where the times are tokens per second of a stream. Locust rounds them to
two digits; the records do not.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any, NoReturn

import gevent
from gevent.event import Event
from locust import LoadTestShape, User, events, task
from locust.env import Environment
from locust.runners import MasterRunner

import loadtest.options  # noqa: F401 # declares them
from loadtest import handover
from loadtest.page import extend
from loadtest.profiles import ProfileError
from loadtest.replay import ReplayError
from loadtest.session import NOT_RUN, Session
from loadtest.slo import SloError

_sessions: dict[Environment, Session] = {}
_ready = Event()
LOCK = "LOADTEST_LOCK"
"""Variable of the file that `loadtest.handover` waits at."""
GRACE_S = 30.0
"""A master waits so much longer than a request may take for workers that do not say that they are done."""
IDLE_S = 1.0

logger = logging.getLogger(__name__)


@events.init.add_listener
def _init(environment: Environment, **_: Any) -> None:
    if lock := os.environ.get(LOCK):
        handover.hold(Path(lock))
    try:
        session = _sessions[environment] = Session(environment)
    except (ProfileError, ReplayError, SloError) as error:
        _refuse(str(error))
    _ready.set()
    # Locust's own listeners come before this one, and quitting fires in reverse: the report is made while workers and
    # what hears them are still there.
    environment.events.quitting.add_listener(_stop)
    if isinstance(environment.shape_class, Traffic):
        environment.shape_class.session = session
    if environment.web_ui:
        extend(environment.web_ui, session)
    main = gevent.getcurrent()

    def interrupt(*_: object) -> None:
        gevent.kill(main, KeyboardInterrupt)

    # Python raises it in whichever greenlet runs; from a user's it would come twice, the second time while Locust ends.
    signal.signal(signal.SIGINT, interrupt)
    if environment.parsed_options and environment.parsed_options.headless:
        # With a shape Locust heeds SIGTERM only once a headless run is over.
        signal.signal(signal.SIGTERM, interrupt)
        if isinstance(environment.runner, MasterRunner):
            _await_workers(environment.runner)


def _refuse(error: str) -> NoReturn:
    sys.stderr.write(f"loadtest: error: {error}\n")
    sys.exit(NOT_RUN)


def _await_workers(runner: MasterRunner) -> None:
    """Waits as Locust would, but ends with `NOT_RUN` if they do not come."""
    options: Any = runner.environment.parsed_options
    wanted, wait_s = options.expect_workers, options.expect_workers_max_wait
    logger.info("waiting for %d workers", wanted)
    why = "the last of them quit"
    try:
        with gevent.Timeout(wait_s or None, TimeoutError):
            # Where the last worker quits, Locust stops what hears others, and would wait for ever.
            while len(runner.greenlet):
                if len(runner.clients.ready) >= wanted:
                    return
                gevent.sleep(0.1)
    except TimeoutError:
        why = f"gave up after {wait_s} s"
    except KeyboardInterrupt:
        why = "interrupted"
    came = len(runner.clients.ready)
    runner.quit()
    _refuse(f"{came} of {wanted} workers are here; {why}")


@events.test_start.add_listener
def _start(environment: Environment, **_: Any) -> None:
    # Locust connects a worker before it fires `init`: a master that waits for no other starts it at once.
    _ready.wait()
    _sessions[environment].start()


@events.test_stop.add_listener
def _stop(environment: Environment, **_: Any) -> None:
    _ready.wait()
    _sessions[environment].stop()


class Traffic(LoadTestShape):
    """Tells Locust when a run is over, and until then to keep a user per process."""

    session: Session | None = None

    def tick(self) -> tuple[int, float] | None:
        """Users and how many of them to start per second; None once all answers are there."""
        assert self.session
        assert self.runner
        if self._over(self.session):
            return None
        processes = max(1, getattr(self.runner, "worker_count", 1))
        return processes, float(processes)

    def _over(self, session: Session) -> bool:
        # Whoever stops it will quit: to stop it once more, Locust would have workers sign off and miss that.
        if session.stopping:
            return False
        if session.gave_up:
            return True
        if not session.is_master:
            return session.load is not None and session.load.ended
        if session.drained:
            return True
        traffic = session.profile.traffic
        planned = sum(stage.seconds for stage in traffic.stages)
        late = time.perf_counter() - self.start_time > planned + session.profile.options.timeout_s + GRACE_S
        # How long a search takes is not known.
        return late and not traffic.search


class LanguageModelUser(User):
    """Stands for a process to Locust, which starts no run without users; what is sent is the load's business."""

    @task
    def rest(self) -> None:
        """Nothing."""
        gevent.sleep(IDLE_S)
