"""`vqserve-ops rollout`: one line per change until every replica serves, or it is clear that they do not."""

from __future__ import annotations

import argparse
import time

from vqserve_ops.cluster import Cluster
from vqserve_ops.errors import FailedError
from vqserve_ops.objects import name_of
from vqserve_ops.release import add_release, engine_of, selector_of
from vqserve_ops.rollout.explain import PodLog, Release, counted, is_given_up, is_rolled_out, stage_of, why_not
from vqserve_ops.rollout.pending import is_unscheduled

_LOOK = 2.0
"""Seconds between two looks."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options of `vqserve-ops rollout`."""
    add_release(parser)
    parser.add_argument(
        "--timeout", type=float, default=2400, metavar="SECONDS", help="how long to wait, default: %(default)s"
    )
    parser.epilog = "Exit code 1: it does not serve in time; the last lines say why."


def run(args: argparse.Namespace) -> int:
    """Watches a release.

    Raises:
        FailedError: It does not serve in time, or Kubernetes has given it up.
        UsageError: There is no such release.
    """
    cluster = Cluster(args.namespace)
    log = log_of(cluster)
    end, said = time.monotonic() + args.timeout, set[str]()
    while True:
        release = look(cluster, args.release)
        problems = why_not(release, log)
        lines = [counted(release), *problems]
        lines += [f"{name_of(pod)}: {stage_of(pod, log)}" for pod in release.current] if not problems else []
        for line in lines:
            if line not in said:
                print(line, flush=True)
        said = set(lines)
        if is_rolled_out(release.deployment):
            return 0
        if is_given_up(release.deployment) or time.monotonic() >= end:
            what = "Kubernetes has given it up" if is_given_up(release.deployment) else f"not in {args.timeout:.0f} s"
            reason = " | ".join(problems) or "no fault is known: see kubectl logs, or give it a longer --timeout"
            raise FailedError(f"release {args.release} does not serve ({what}): {reason}")
        time.sleep(min(_LOOK, max(0.0, end - time.monotonic())))


def look(cluster: Cluster, name: str) -> Release:
    """A release as it is now."""
    deployment = engine_of(cluster, name)
    labels = selector_of(deployment)
    pods = cluster.listed("Pod", labels)
    nodes = cluster.nodes() if any(is_unscheduled(pod) for pod in pods) else []
    return Release(deployment, cluster.listed("ReplicaSet", labels), pods, cluster.listed("Event"), nodes)


def log_of(cluster: Cluster) -> PodLog:
    """Reads logs of a cluster's pods."""
    return lambda pod, container, previous: cluster.log(pod, container, previous=previous)
