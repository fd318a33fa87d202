"""`vqserve-ops drain`: takes one pod out of rotation, and waits until it has no requests any more.

No node is cordoned and no object changed: the pod's own server is told, and says no at `/ready` from then on.
"""

from __future__ import annotations

import argparse
import re
import time
from collections.abc import Sequence

from vqserve.format.errors import UsageError
from vqserve_ops.cluster import Cluster
from vqserve_ops.errors import FailedError
from vqserve_ops.objects import Object, condition, name_of
from vqserve_ops.release import add_release, engine_of, selector_of

_LOOK = 2.0
"""Seconds between two looks."""
_QUIET = 3
"""Looks in a row without a request until it counts as drained: endpoints take time to follow."""
_REQUESTS = re.compile(r"^vllm:num_requests_(?:running|waiting)(?:\{[^}]*\})? (?P<count>[0-9.e+]+)$", re.MULTILINE)
_ENGINE = "engine"
_METRICS = (
    "import sys, urllib.request as web; opener = web.build_opener(web.ProxyHandler({})); "
    "sys.stdout.write(opener.open(sys.argv[1], timeout=10).read().decode())"
)
"""Asked from within the pod: a NetworkPolicy may keep the API server, through which pods can be asked as well, out."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options of `vqserve-ops drain`."""
    add_release(parser)
    parser.add_argument("--pod", metavar="NAME", help="which; may be left out if there is one")
    parser.add_argument(
        "--timeout", type=float, default=600, metavar="SECONDS", help="for its requests, default: %(default)s"
    )
    parser.epilog = "The pod stays out until it is deleted or its container restarts. Exit code 1: requests are left."


def run(args: argparse.Namespace) -> int:
    """Drains a pod.

    Raises:
        FailedError: It cannot be told, or has requests after the timeout.
        UsageError: There is no such release or pod.
    """
    cluster = Cluster(args.namespace)
    pods = cluster.listed("Pod", selector_of(engine_of(cluster, args.release)))
    pod = chosen(pods, args.pod, args.release)
    name, port = name_of(pod), port_of(pod)
    code, printed = cluster.execute(name, _ENGINE, ["vqserve", "drain", "--port", str(port)], 30)
    said = " ".join(printed.split())
    if code != 0:
        raise FailedError(f"pod {name}: cannot be drained ({said}); see kubectl logs {name}")
    print(f"{name}: {said}", flush=True)
    wait_until_quiet(cluster, name, port, args.timeout)
    print(f"{name}: has no requests any more; kubectl delete pod {name} replaces it", flush=True)
    return 0


def wait_until_quiet(cluster: Cluster, pod: str, port: int, timeout: float) -> None:
    """Returns once a pod has had no request for some looks."""
    end, quiet, said = time.monotonic() + timeout, 0, -1
    while quiet < _QUIET:
        try:
            code, printed = cluster.execute(pod, _ENGINE, asked(port), 30)
        except FailedError as error:
            problem = f"is drained, but its requests cannot be seen ({error})"
            raise FailedError(f"pod {pod}: {problem}; look at its log before it is deleted") from error
        if code != 0 or (left := requests_in(printed)) is None:
            problem = f"is drained, but its metrics on port {port} do not tell of requests"
            raise FailedError(f"pod {pod}: {problem}; look at its log before it is deleted")
        if left != said:
            print(f"{pod}: {left} requests running or waiting", flush=True)
            said = left
        quiet = quiet + 1 if left == 0 else 0
        if left and time.monotonic() >= end:
            remedy = "give it a longer --timeout; deleted now, it has drain.seconds for them"
            raise FailedError(f"pod {pod}: {left} requests are left after {timeout:.0f} s; {remedy}")
        if quiet < _QUIET:
            time.sleep(_LOOK)


def chosen(pods: Sequence[Object], name: str | None, release: str) -> Object:
    """The pod to drain.

    Raises:
        UsageError: None is of that name, or it is not clear which is meant.
    """
    there = [pod for pod in pods if "deletionTimestamp" not in pod["metadata"]]
    ready = [pod for pod in there if condition(pod, "Ready").get("status") == "True"]
    names = ", ".join(map(name_of, ready)) or "none"
    if name is not None:
        found = [pod for pod in there if name_of(pod) == name]
        if not found:
            raise UsageError(f"--pod {name}: no pod of release {release}; those that serve: {names}")
        return found[0]
    if len(ready) != 1:
        raise UsageError(f"release {release}: expected one pod that serves, found {names}; name one by --pod")
    return ready[0]


def port_of(pod: Object) -> int:
    """The port of a pod's engine."""
    for container in pod["spec"]["containers"]:
        for port in container.get("ports") or []:
            if container["name"] == _ENGINE and port.get("name") == "http":
                return int(port["containerPort"])
    return 8001


def asked(port: int) -> list[str]:
    """What a container runs to print the metrics of its engine."""
    return ["python3", "-c", _METRICS, f"http://127.0.0.1:{port}/metrics"]


def requests_in(metrics: str) -> int | None:
    """Requests that run or wait; None if the metrics do not say."""
    found = [float(match["count"]) for match in _REQUESTS.finditer(metrics)]
    return round(sum(found)) if found else None
