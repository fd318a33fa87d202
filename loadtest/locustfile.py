"""What Locust loads: `locust -f loadtest/locustfile.py --host http://127.0.0.1:8001 --load-profile smoke`.

Its statistics have a row per kind of prompt for e2e, TTFT and ITL in milliseconds (where the latter two count first
chunks and gaps as requests), and for `tok/s`, where the times are tokens per second of a stream. Locust rounds them to
two digits; the records do not.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

import gevent
from locust import LoadTestShape, User, events, task
from locust.argument_parser import LocustArgumentParser
from locust.env import Environment
from locust.exception import StopUser

from loadtest import handover
from loadtest.page import extend
from loadtest.profiles import ProfileError
from loadtest.replay import ReplayError
from loadtest.session import Session
from loadtest.slo import SloError

_sessions: dict[Environment, Session] = {}
LOCK = "LOADTEST_LOCK"
"""Variable of the file that `loadtest.handover` waits at."""
GRACE_S = 30.0
"""A master waits so much longer than a request may take for workers that do not say that they are done."""


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
        sys.exit(f"loadtest: error: {error}")
    if isinstance(environment.shape_class, Traffic):
        environment.shape_class.session = session
    if environment.web_ui:
        extend(environment.web_ui, session)


@events.test_start.add_listener
def _start(environment: Environment, **_: Any) -> None:
    _sessions[environment].start()


@events.test_stop.add_listener
def _stop(environment: Environment, **_: Any) -> None:
    _sessions[environment].stop()


@events.quitting.add_listener
def _quit(environment: Environment, **_: Any) -> None:
    # Ctrl-C and SIGTERM: a run that is on ends as it would by itself, workers first, and is reported.
    if environment in _sessions and _sessions[environment].active and environment.runner:
        environment.runner.stop()


class Traffic(LoadTestShape):
    """Tells Locust how many users to keep; when each of them sends is the load's business.

    An open loop has one user per process, which dispatches. Users of a closed loop that a later stage does not want
    rest: Locust would end them in the middle of an answer.
    """

    session: Session | None = None

    def tick(self) -> tuple[int, float] | None:
        """Users and how many of them to start per second; None once all answers are there."""
        assert self.session
        assert self.runner
        traffic = self.session.profile.traffic
        if self._over(self.session):
            return None
        users = max((stage.users or 0 for stage in traffic.stages), default=0)
        if traffic.is_open:
            users = max(1, getattr(self.runner, "worker_count", 1))
        return users, float(users)

    def _over(self, session: Session) -> bool:
        assert self.runner
        elapsed = time.perf_counter() - self.start_time
        if not session.is_master:
            # Locust asks once before it starts the test; an ended test without a load could not be started.
            return session.load.ended if session.load else elapsed > 1
        if session.failed:
            return True
        planned = sum(stage.seconds for stage in session.profile.traffic.stages)
        if elapsed < planned:
            return False
        return session.drained or elapsed > planned + session.profile.options.timeout_s + GRACE_S


class LanguageModelUser(User):
    """Whoever asks: a user of a closed loop, or the dispatcher of an open one."""

    def on_start(self) -> None:
        """Takes a number."""
        self._index = _sessions[self.environment].next_user()

    @task
    def send(self) -> None:
        """One request of a closed loop; all of an open one."""
        session = _sessions[self.environment]
        if session.load is None:
            raise StopUser
        if not session.profile.traffic.is_open:
            session.load.user(self._index)
        elif not session.load.ended:
            session.load.dispatch()
        else:
            gevent.sleep(1)
