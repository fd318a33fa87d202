"""What Locust loads: `locust -f loadtest/locustfile.py --host http://127.0.0.1:8001 --load-profile smoke`.

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
from locust.argument_parser import LocustArgumentParser
from locust.env import Environment
from locust.runners import MasterRunner

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


@events.init_command_line_parser.add_listener
def _arguments(parser: LocustArgumentParser, **_: Any) -> None:
    group = parser.add_argument_group("load test of a language model; its API key is read from VLLM_API_KEY")
    profile_help = "name of a profile in loadtest/profiles, or path of a TOML file"
    group.add_argument("--load-profile", default="smoke", env_var="LOADTEST_PROFILE", help=profile_help)
    group.add_argument("--model", default="", env_var="LOADTEST_MODEL", help="default: the first that the server lists")
    group.add_argument("--records", default="build/loadtest", env_var="LOADTEST_RECORDS", help="folder of the runs")
    group.add_argument(
        "--run-name", default="", env_var="LOADTEST_RUN", help="name of the run; default: profile and time"
    )
    salt_help = "of the prompts, as a run states it, to ask the very same again; default: drawn anew for each run"
    group.add_argument("--salt", default="", env_var="LOADTEST_SALT", help=salt_help)
    slo_help = "what to judge by, e.g. ttft_s=2,tpot_s=0.05,failures=0.01; without it every request has to be good"
    group.add_argument("--slo", default="", env_var="LOADTEST_SLO", help=slo_help)
    metrics_help = "of the server, sampled beside; default: /metrics of --host; `none`: nothing is"
    group.add_argument("--metrics-url", default="", env_var="LOADTEST_METRICS_URL", help=metrics_help)
    wait_help = "seconds for the server to state its model; a cluster may still be starting it"
    group.add_argument("--wait-s", type=float, default=0.0, env_var="LOADTEST_WAIT_S", help=wait_help)
    pid_help = "process of this machine whose memory is watched, children included: the server's"
    group.add_argument("--watch-pid", type=int, default=0, env_var="LOADTEST_WATCH_PID", help=pid_help)
    host_help = "name to ask for, where --host is an ingress's address"
    group.add_argument("--host-header", default="", env_var="LOADTEST_HOST_HEADER", help=host_help)


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
    if environment.parsed_options and environment.parsed_options.headless:
        main = gevent.getcurrent()
        # As Ctrl-C: with a shape Locust heeds SIGTERM only once a headless run is over.
        signal.signal(signal.SIGTERM, lambda *_: gevent.kill(main, KeyboardInterrupt))
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
