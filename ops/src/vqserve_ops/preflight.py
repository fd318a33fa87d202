"""`vqserve-ops preflight`: `vqserve preflight` as a Job, scheduled as the engine is, before or beside a release."""

from __future__ import annotations

import argparse
import copy
import secrets
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml

from vqserve.format.errors import UsageError
from vqserve_ops.cluster import Cluster
from vqserve_ops.errors import FailedError
from vqserve_ops.objects import Object, name_of
from vqserve_ops.release import COMPONENT, INSTANCE, PART_OF, engine_of
from vqserve_ops.rollout.explain import why_pod_not
from vqserve_ops.rollout.failing import failed_checks
from vqserve_ops.rollout.pending import is_unscheduled

_LOOK = 2.0
"""Seconds between two looks."""
_NAME = "preflight"
_KEPT = 600
"""Seconds after which Kubernetes removes the Job if this program could not."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options of `vqserve-ops preflight`."""
    parser.add_argument("release", nargs="?", metavar="RELEASE", help="name of an installed release")
    parser.add_argument(
        "--rendered", metavar="FILE", help="instead, before an install: what `helm template` prints; - for stdin"
    )
    parser.add_argument("-n", "--namespace", metavar="NAME", help="default: the one that KUBECONFIG has")
    parser.add_argument(
        "--timeout", type=float, default=900, metavar="SECONDS", help="how long to wait, default: %(default)s"
    )
    parser.epilog = "Exit code 1: the node cannot serve so, or none was found in time."


def run(args: argparse.Namespace) -> int:
    """Makes the Job, prints its log, and removes it.

    Raises:
        FailedError: The node cannot serve, or the Job did not run.
        UsageError: There is no such release or Deployment.
    """
    if (args.release is None) == (args.rendered is None):
        raise UsageError("expected either RELEASE or --rendered FILE; give one")
    cluster = Cluster(args.namespace)
    deployment = rendered(args.rendered) if args.rendered else engine_of(cluster, args.release)
    job, notes = job_of(deployment, lambda claim: cluster.get("PersistentVolumeClaim", claim) is not None, args.timeout)
    for note in notes:
        print(note, flush=True)
    name = name_of(cluster.create("Job", job))
    try:
        return _watch(cluster, name, args.timeout)
    finally:
        cluster.delete("Job", name)


def rendered(where: str) -> Object:
    """The engine's Deployment among rendered objects.

    Raises:
        UsageError: There is none.
    """
    try:
        text = sys.stdin.read() if where == "-" else Path(where).read_text("utf-8")
        found = [thing for thing in yaml.safe_load_all(text) if isinstance(thing, dict)]
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise UsageError(f"--rendered {where}: cannot be read ({reason}); give what `helm template` prints") from error
    for thing in found:
        labels = (thing.get("metadata") or {}).get("labels") or {}
        if thing.get("kind") == "Deployment" and labels.get(COMPONENT) == "engine":
            return thing
    raise UsageError(f"--rendered {where}: holds no Deployment of the chart vqserve; give what `helm template` prints")


def job_of(deployment: Object, is_claim: Callable[[str], bool], timeout: float) -> tuple[dict[str, Any], list[str]]:
    """A Job whose pod is the engine's with the preflight as its only container.

    Args:
        deployment: Of the engine.
        is_claim: Whether the cluster has a claim of that name.
        timeout: Seconds that the Job may take.

    Returns:
        The Job, and what is otherwise than in the engine's pod.
    """
    spec = copy.deepcopy(dict(deployment["spec"]["template"]["spec"]))
    container = _preflight(spec)
    notes = []
    for volume in spec.get("volumes") or []:
        claim = (volume.get("persistentVolumeClaim") or {}).get("claimName")
        if claim is None or is_claim(claim):
            continue
        if volume["name"] == "model":
            container["args"] = [word for word in container["args"] if word != "/model"]
            notes.append(f"claim {claim} is not there yet: the node is judged without the checkpoint")
        del volume["persistentVolumeClaim"]
        volume["emptyDir"] = {}
    spec |= {"initContainers": [], "containers": [container], "restartPolicy": "Never"}
    spec["terminationGracePeriodSeconds"] = 10
    labels = deployment["metadata"].get("labels") or {}
    own = {name: labels[name] for name in ("app.kubernetes.io/name", INSTANCE, PART_OF) if name in labels}
    own[COMPONENT] = _NAME
    job = {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {"name": f"{name_of(deployment)[:40]}-{_NAME}-{secrets.token_hex(3)}", "labels": own},
        "spec": {
            "backoffLimit": 0,
            "activeDeadlineSeconds": max(1, round(timeout)),
            "ttlSecondsAfterFinished": _KEPT,
            "template": {"metadata": {"labels": own}, "spec": spec},
        },
    }
    return job, notes


def _preflight(spec: Mapping[str, Any]) -> dict[str, Any]:
    """The preflight as the chart has it, or, where it is off, made from the engine, which takes the same options."""
    for found in spec.get("initContainers") or []:
        if found["name"] == _NAME:
            container = dict(found)
            args = list(container["args"])
            break
    else:
        [engine] = (found for found in spec["containers"] if found["name"] == "engine")
        wanted = ("image", "imagePullPolicy", "securityContext", "command", "env", "resources", "volumeMounts")
        container = {"name": _NAME, **{key: engine[key] for key in wanted if key in engine}}
        container["env"] = [entry for entry in engine.get("env") or [] if "valueFrom" not in entry]
        args = [_NAME, "/model", "--mode", "refuse", "--message", "/dev/termination-log", *engine["args"][2:]]
    if "--mode" in args:
        args[args.index("--mode") + 1] = "refuse"
    container["args"] = args
    return container


def _watch(cluster: Cluster, job: str, timeout: float) -> int:
    end, said = time.monotonic() + timeout, ""
    while True:
        pods = cluster.listed("Pod", {"batch.kubernetes.io/job-name": job})
        if pods and (ended := ended_with(pods[0])) is not None:
            print(cluster.log(name_of(pods[0]), _NAME, lines=1000), end="", flush=True)
            return judged(ended)
        events = cluster.listed("Event") if pods else []
        nodes = cluster.nodes() if pods and is_unscheduled(pods[0]) else []
        problems = why_pod_not(pods[0], events, lambda *_: "", nodes) if pods else []
        if (line := " | ".join(problems) or "waiting for the Job's pod") != said:
            print(f"{job}: {line}", flush=True)
            said = line
        if time.monotonic() >= end:
            raise FailedError(f"{job}: has not run in {timeout:.0f} s: {said}")
        time.sleep(_LOOK)


def ended_with(pod: Object) -> Mapping[str, Any] | None:
    """How the preflight's container ended; None if it has not."""
    for state in pod.get("status", {}).get("containerStatuses") or []:
        ended: Mapping[str, Any] | None = (state.get("state") or {}).get("terminated")
        if ended:
            return ended
    return None


def judged(ended: Mapping[str, Any]) -> int:
    """The exit code for how the preflight ended.

    Raises:
        FailedError: The node cannot serve.
    """
    if ended.get("exitCode") == 0:
        print("the node can serve so", flush=True)
        return 0
    found = failed_checks(str(ended.get("message") or ""))
    reason = found or f"exit code {ended.get('exitCode')}, {ended.get('reason', 'no reason given')}; see the log above"
    raise FailedError(f"the node cannot serve so: {reason}")
