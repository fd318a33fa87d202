"""Why a pod is not started: from its conditions and events to sentences, each with the remedy."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from vqserve_ops.objects import Object, condition, name_of
from vqserve_ops.rollout.nodes import GPU, gpus_had, labels_had, wanted_labels

_NODES = r"(?P<count>\d+) "

Say = Callable[[re.Match[str], Object, Sequence[Object]], str]
"""A sentence, from what the scheduler said, the pod, and all nodes (none if they may not be read)."""


def _gpus(match: re.Match[str], pod: Object, nodes: Sequence[Object]) -> str:
    wanted = max((int(limits(container).get(GPU, 0)) for container in containers(pod)), default=0)
    had = gpus_had(nodes)
    return (
        f"{_count(match)} too few free GPUs, and the pod wants {wanted} of one node{had and f' ({had})'}; "
        "free some, add a node, or lower engine.gpus"
    )


def _labels(match: re.Match[str], pod: Object, nodes: Sequence[Object]) -> str:
    wanted, had = ", ".join(wanted_labels(pod)) or "its affinity", labels_had(pod, nodes)
    return (
        f"{_count(match, 'is', 'are')} not labelled {wanted}{had and f' ({had})'}; "
        "run NVIDIA's GPU feature discovery, or set scheduling.products and nodeSelector to what nodes have"
    )


_SCHEDULING: Sequence[tuple[str, Say]] = (
    (_NODES + re.escape(f"Insufficient {GPU}"), _gpus),
    (
        _NODES + r"Insufficient (?P<what>[\w./-]+)",
        lambda match, *_: f"{_count(match)} too little free {match['what']}; lower resources.requests, or add a node",
    ),
    (_NODES + r"node\(s\) didn't match (Pod's )?node (affinity/selector|affinity|selector)", _labels),
    (
        _NODES + r"node\(s\) had untolerated taint(\(s\))? ?(\{(?P<taint>[^}]*)\})?",
        lambda match, *_: (
            f"{_count(match)} a taint that is not tolerated ({(match['taint'] or 'see the node').rstrip(': ')}); "
            "add it to scheduling.tolerations, or take it off the node"
        ),
    ),
    (
        _NODES + r"node\(s\) were unschedulable",
        lambda match, *_: f"{_count(match, 'is', 'are')} cordoned; kubectl uncordon NODE",
    ),
    (
        r'persistentvolumeclaim "(?P<claim>[^"]+)" not found',
        lambda match, *_: (
            f"there is no PersistentVolumeClaim {match['claim']}; make it, or correct model.pvc.claimName"
        ),
    ),
    (
        r"unbound immediate PersistentVolumeClaims|didn't find available persistent volumes to bind",
        lambda _, pod, __: (
            f"a claim of its is not bound ({', '.join(claims_of(pod))}); make a volume for it, or correct its class "
            "(kubectl describe pvc)"
        ),
    ),
    (
        _NODES + r"node\(s\) had volume node affinity conflict",
        lambda match, *_: f"{_count(match, 'is', 'are')} not where its volume is; free GPUs on the node that has it",
    ),
    (
        r"cannot allocate all claims|resourceclaim",
        lambda *_: "no node has the devices of its resource claim; check scheduling.dra and the DRA driver's slices",
    ),
)  # fmt: skip

_MOUNTING: Sequence[tuple[str, str]] = (
    (r'secret "(?P<name>[^"]+)" not found', "there is no Secret {name}; make it, or correct the values that name it"),
    (
        r'configmap "(?P<name>[^"]+)" not found',
        "there is no ConfigMap {name}; make it, or correct the values that name it",
    ),
    (
        r"references non-existent secret key: (?P<name>\S+)",
        "the Secret has no key {name}; add it, or correct model.download.tokenSecret.key",
    ),
    (
        r"hostPath type check failed: (?P<name>\S+) is not a directory",
        "the node has no folder {name}; put the checkpoint there, or correct model.hostPath.path",
    ),
    (
        r"already (exclusively attached|used by)|Multi-Attach",
        "its volume is attached to another node; end the pod there, or take a claim with ReadWriteMany",
    ),
)


def is_unscheduled(pod: Object) -> bool:
    """Whether the scheduler has looked for a node and found none."""
    return condition(pod, "PodScheduled").get("status") == "False"


def why_not_scheduled(pod: Object, events: Sequence[Object], nodes: Sequence[Object] = ()) -> list[str]:
    """What keeps the scheduler from finding a node; with nodes, what they have instead."""
    scheduled = condition(pod, "PodScheduled")
    if not is_unscheduled(pod):
        return []
    text = str(scheduled.get("message") or last_message(pod, events, "FailedScheduling"))
    text = re.split(r"\.? ?preemption:", text)[0]
    said: dict[str, None] = {}
    spans: list[tuple[int, int]] = []
    for pattern, say in _SCHEDULING:
        for match in re.finditer(pattern, text):
            if not any(first < match.end() and match.start() < last for first, last in spans):
                said[say(match, pod, nodes)] = None
                spans.append(match.span())
    if scheduled.get("reason") == "SchedulingGated":
        return ["its scheduling is held back by a gate; see the controller that set spec.schedulingGates"]
    return list(said) or [f"no node takes it ({text or 'nothing said yet'}); see kubectl describe pod"]


def why_not_mounted(pod: Object, events: Sequence[Object]) -> list[str]:
    """What keeps its volumes or its network from being set up."""
    for reason in ("FailedMount", "FailedAttachVolume", "FailedCreatePodSandBox", "FailedMapVolume"):
        text = last_message(pod, events, reason)
        if not text:
            continue
        for pattern, sentence in _MOUNTING:
            if match := re.search(pattern, text):
                return [sentence.format(**match.groupdict())]
        return [f"the node cannot set it up ({reason}: {text}); see the node's kubelet"]
    return []


def why_no_pod(deployment: Object, replica_set: Object | None) -> list[str]:
    """What keeps pods from being made at all."""
    found = condition(replica_set, "ReplicaFailure") if replica_set else {}
    found = found or condition(deployment, "ReplicaFailure")
    text = str(found.get("message") or "")
    if found.get("status") != "True" or not text:
        return []
    name = name_of(deployment)
    if match := re.search(r'violates PodSecurity "(?P<level>[^":]+)[^"]*": (?P<what>.*)', text):
        remedy = "set podSecurity.standard and what it refuses accordingly, or label the namespace for a laxer one"
        return [f"{name}: the namespace's PodSecurity {match['level']!r} refuses its pods: {match['what']}; {remedy}"]
    if match := re.search(r"exceeded quota: (?P<what>.*)", text):
        return [f"{name}: the namespace's quota is used up: {match['what']}; raise it, or lower resources"]
    if match := re.search(r'admission webhook "(?P<hook>[^"]+)" denied the request:? ?(?P<what>.*)', text):
        return [f"{name}: the cluster's policy {match['hook']} refuses its pods: {match['what']}; change the values"]
    return [f"{name}: no pod can be made ({text}); correct the values"]


def last_message(thing: Object, events: Sequence[Object], reason: str, begin: str = "") -> str:
    """What the newest event of a reason says about an object, of those that begin so."""
    uid = thing["metadata"].get("uid")
    of_it = [
        event
        for event in events
        if event.get("reason") == reason
        and event.get("involvedObject", {}).get("uid") == uid
        and str(event.get("message") or "").startswith(begin)
    ]
    newest = max(of_it, key=_time, default={})
    return " ".join(str(newest.get("message") or "").split())


def _time(event: Object) -> str:
    series: Mapping[str, Any] = event.get("series") or {}
    return str(series.get("lastObservedTime") or event.get("lastTimestamp") or event.get("eventTime") or "")


def containers(pod: Object) -> list[Mapping[str, Any]]:
    """Its containers, those that run before the others first."""
    spec = pod["spec"]
    return [*(spec.get("initContainers") or []), *(spec.get("containers") or [])]


def limits(container: Mapping[str, Any]) -> Mapping[str, Any]:
    """A container's limits."""
    found: Mapping[str, Any] = (container.get("resources") or {}).get("limits") or {}
    return found


def claims_of(pod: Object) -> list[str]:
    """The claims that it mounts."""
    volumes = pod["spec"].get("volumes") or []
    return [volume["persistentVolumeClaim"]["claimName"] for volume in volumes if "persistentVolumeClaim" in volume]


def _count(match: re.Match[str], one: str = "has", many: str = "have") -> str:
    return f"1 node {one}" if match["count"] == "1" else f"{match['count']} nodes {many}"
