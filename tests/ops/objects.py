"""Objects as the API has them, with as little in them as the tests need."""

from __future__ import annotations

from typing import Any

UID = "1234"
Made = dict[str, Any]


def pod(
    *,
    conditions: list[Made] | None = None,
    init: list[Made] | None = None,
    engine: Made | None = None,
    limits: dict[str, str] | None = None,
    **status: Any,
) -> Made:
    """A pod of the engine with its init containers' states and its own."""
    inits = [{"name": name, "image": f"r/{name}:1"} for name in ("wait-for-checkpoint", "preflight")]
    container = {
        "name": "engine",
        "image": "r/serve:1",
        "resources": {"limits": limits or {"nvidia.com/gpu": "2"}},
        "startupProbe": {"periodSeconds": 5, "failureThreshold": 360},
    }
    expression = {"key": "nvidia.com/gpu.product", "operator": "In", "values": ["RTX-A", "RTX-B"]}
    required = {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": [
        {"matchExpressions": [expression]}
    ]}}  # fmt: skip
    return {
        "metadata": {"name": "glm-1", "uid": UID, "labels": {"pod-template-hash": "h1"}},
        "spec": {
            "initContainers": inits,
            "containers": [container],
            "volumes": [{"name": "model", "persistentVolumeClaim": {"claimName": "glm-model"}}],
            "affinity": {"nodeAffinity": required},
        },
        "status": {
            "phase": "Pending",
            "conditions": conditions or [],
            "initContainerStatuses": init or [],
            "containerStatuses": [engine] if engine else [],
            **status,
        },
    }


def state(
    name: str = "engine", *, last: Made | None = None, restarts: int = 0, ready: bool = False, **now: Any
) -> Made:
    """A container's state: `waiting`, `running` or `terminated`."""
    made: Made = {"name": name, "state": now, "restartCount": restarts, "ready": ready}
    return made | ({"lastState": {"terminated": last}} if last else {})


def unschedulable(message: str) -> Made:
    return pod(conditions=[{"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": message}])


def event(reason: str, message: str, time: str = "2026-01-01T00:00:00Z") -> Made:
    return {"reason": reason, "message": message, "lastTimestamp": time, "involvedObject": {"uid": UID}}


def deployment(*, generation: int = 2, observed: int = 2, wanted: int = 1, **status: Any) -> Made:
    return {
        "metadata": {
            "name": "glm-vqserve",
            "uid": "d",
            "generation": generation,
            "annotations": {"deployment.kubernetes.io/revision": "3"},
        },
        "spec": {"replicas": wanted, "selector": {"matchLabels": {"app.kubernetes.io/instance": "glm"}}},
        "status": {"observedGeneration": observed, **status},
    }


def replica_set(digest: str = "h1", revision: str = "3", conditions: list[Made] | None = None) -> Made:
    return {
        "metadata": {
            "name": f"glm-{digest}",
            "ownerReferences": [{"uid": "d"}],
            "labels": {"pod-template-hash": digest},
            "annotations": {"deployment.kubernetes.io/revision": revision},
        },
        "status": {"conditions": conditions or []},
    }
