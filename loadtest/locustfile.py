"""What Locust loads: `locust -f loadtest/locustfile.py --host http://127.0.0.1:8001 --load-profile smoke`.

Its statistics have a row per kind of prompt for e2e, TTFT and ITL in milliseconds (where the latter two count first
chunks and gaps as requests), and for `tok/s`, where the times are tokens per second of a stream. Locust rounds them to
two digits; the records do not.
"""

from __future__ import annotations

import sys
import time
from typing import Any

import gevent
from locust import LoadTestShape, User, events, task
from locust.argument_parser import LocustArgumentParser
from locust.env import Environment
from locust.exception import StopUser
from locust.runners import MasterRunner

from loadtest import profiles
from loadtest.profiles import ProfileError
from loadtest.replay import ReplayError
from loadtest.session import DRAINED, Session

_sessions: dict[Environment, Session] = {}
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
    sources_help = "processes that share the traffic: of a distributed run, the number of workers"
    group.add_argument("--sources", type=int, default=1, env_var="LOADTEST_SOURCES", help=sources_help)
    host_help = "name to ask for, where --host is an ingress's address"
    group.add_argument("--host-header", default="", env_var="LOADTEST_HOST_HEADER", help=host_help)


@events.init.add_listener
def _init(environment: Environment, **_: Any) -> None:
    options: Any = environment.parsed_options
    try:
        profile = profiles.read(profiles.find(options.load_profile))
        if profile.traffic.search and options.sources > 1:
            raise ProfileError(
                f"{profile.name}: a search judges its own records and runs in one process; leave out --sources"
            )
    except (ProfileError, ReplayError) as error:
        sys.exit(f"loadtest: error: {error}")
    session = _sessions[environment] = Session(environment, profile)
    if isinstance(environment.shape_class, Traffic):
        environment.shape_class.session = session
    if isinstance(environment.runner, MasterRunner):
        environment.runner.register_message(DRAINED, lambda msg, **_: session.drained.add(msg.node_id))


@events.test_start.add_listener
def _start(environment: Environment, **_: Any) -> None:
    try:
        _sessions[environment].start()
    except (ProfileError, ValueError) as error:
        # Locust logs what a listener raises and goes on without it.
        environment.process_exit_code = 2
        sys.stderr.write(f"loadtest: error: {error}\n")


@events.test_stop.add_listener
def _stop(environment: Environment, **_: Any) -> None:
    _sessions[environment].stop()


@events.quitting.add_listener
def _quit(environment: Environment, **_: Any) -> None:
    if environment in _sessions:
        _sessions[environment].stop()


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
        planned = sum(stage.seconds for stage in session.profile.traffic.stages)
        if elapsed < planned:
            return False
        everyone = len(session.drained) >= getattr(self.runner, "worker_count", 1)
        return everyone or elapsed > planned + session.profile.options.timeout_s + GRACE_S


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
