"""One release as it is now, in sentences."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from vqserve_ops.objects import Object, condition, name_of
from vqserve_ops.release import current_set, pods_of
from vqserve_ops.rollout.failing import why_failing
from vqserve_ops.rollout.pending import why_no_pod, why_not_mounted, why_not_scheduled

PodLog = Callable[[str, str, bool], str]
"""The end of a log, by pod, container and whether it is that of before the last restart."""


@dataclass(frozen=True)
class Release:
    """What the API says of a release.

    Attributes:
        deployment: Of the engine.
        sets: ReplicaSets of its labels.
        pods: Pods of its labels.
        events: Of the namespace.
        nodes: All of the cluster, if a pod waits for one and they may be read.
    """

    deployment: Object
    sets: Sequence[Object]
    pods: Sequence[Object]
    events: Sequence[Object]
    nodes: Sequence[Object] = ()

    @property
    def current(self) -> list[Object]:
        """Pods of the present template."""
        return pods_of(current_set(self.deployment, self.sets), self.pods)


def is_rolled_out(deployment: Object) -> bool:
    """Whether every replica is of the present template and available, and no other is left."""
    status, wanted = deployment.get("status", {}), deployment["spec"].get("replicas", 1)
    return bool(
        status.get("observedGeneration", 0) >= deployment["metadata"].get("generation", 0)
        and status.get("updatedReplicas", 0) == wanted
        and status.get("replicas", 0) == wanted
        and status.get("availableReplicas", 0) == wanted
    )


def is_given_up(deployment: Object) -> bool:
    """Whether Kubernetes has reported that the rollout does not get on."""
    status = deployment.get("status", {})
    is_seen = status.get("observedGeneration", 0) >= deployment["metadata"].get("generation", 0)
    return is_seen and condition(deployment, "Progressing").get("reason") == "ProgressDeadlineExceeded"


def counted(release: Release) -> str:
    """How far the rollout is."""
    deployment = release.deployment
    status, wanted = deployment.get("status", {}), deployment["spec"].get("replicas", 1)
    if status.get("observedGeneration", 0) < deployment["metadata"].get("generation", 0):
        return f"{name_of(deployment)}: the change has not been taken up yet"
    old = status.get("replicas", 0) - status.get("updatedReplicas", 0)
    text = (
        f"{status.get('updatedReplicas', 0)} of {wanted} replicas updated, {status.get('availableReplicas', 0)} serve"
    )
    return f"{name_of(deployment)}: {text}" + (f", {old} of before" if old > 0 else "")


def stage_of(pod: Object, log: PodLog) -> str:
    """What a pod that gets on is doing."""
    status = pod.get("status", {})
    if condition(pod, "Ready").get("status") == "True":
        return "serves"
    for state in status.get("initContainerStatuses") or []:
        if "running" in (state.get("state") or {}):
            if state["name"] == "wait-for-checkpoint":
                lines = log(name_of(pod), state["name"], False).strip().splitlines()
                return f"waits for the checkpoint ({lines[-1] if lines else 'its log says nothing yet'})"
            return f"runs {state['name']}"
    for state in status.get("containerStatuses") or []:
        if "running" in (state.get("state") or {}):
            return "is up, but not ready: draining, or its answers are late" if state.get("started") else "loads"
    return "waits for a node" if status.get("phase") == "Pending" and not pod["spec"].get("nodeName") else "is set up"


def why_not(release: Release, log: PodLog) -> list[str]:
    """What keeps a release from serving, each in a line with its remedy; empty if nothing is known to."""
    said = []
    if len(release.current) < release.deployment["spec"].get("replicas", 1):
        said += why_no_pod(release.deployment, current_set(release.deployment, release.sets))
    for pod in release.current:
        said += [f"{name_of(pod)}: {text}" for text in why_pod_not(pod, release.events, log, release.nodes)]
    return said


def why_pod_not(pod: Object, events: Sequence[Object], log: PodLog, nodes: Sequence[Object] = ()) -> list[str]:
    """What keeps one pod from serving."""
    if condition(pod, "Ready").get("status") == "True":
        return []
    if found := why_not_scheduled(pod, events, nodes):
        return found
    name = name_of(pod)
    found = why_failing(pod, events, lambda container, previous: log(name, container, previous))
    running = [
        state
        for state in [
            *(pod.get("status", {}).get("initContainerStatuses") or []),
            *(pod.get("status", {}).get("containerStatuses") or []),
        ]
        if (state.get("state") or {}).keys() & {"running", "terminated"}
    ]
    return found or ([] if running else why_not_mounted(pod, events))
