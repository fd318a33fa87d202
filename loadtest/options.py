"""The options of a load test beside Locust's own; importing this declares them to Locust.

Apart from the locustfile, because Locust answers `--help` before it reads one.
"""

from __future__ import annotations

from typing import Any

from locust import events
from locust.argument_parser import LocustArgumentParser


@events.init_command_line_parser.add_listener
def declare(parser: LocustArgumentParser, **_: Any) -> None:
    """Adds ours to Locust's."""
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
