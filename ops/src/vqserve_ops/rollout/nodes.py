"""What nodes have of what a pod asks for: the second half of why the scheduler finds none."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from vqserve_ops.objects import Object, labels_of, name_of

GPU = "nvidia.com/gpu"
_NAMES = 3
"""Nodes that are named; of more, how many."""


def wanted_labels(pod: Object) -> list[str]:
    """What a pod's selector and affinity ask of nodes' labels, in words."""
    return [
        f"{found['key']} {found['operator']} ({', '.join(found.get('values') or [])})"
        if "operator" in found
        else f"{found['key']}={found['value']}"
        for found in _requirements(pod)
    ]


def labels_had(pod: Object, nodes: Sequence[Object]) -> str:
    """What nodes have of the labels that a pod asks for and not all nodes have so; empty if that is not known."""
    said = []
    for wanted in _requirements(pod):
        if all(_is_met(wanted, labels_of(node)) for node in nodes):
            continue
        holders: dict[str, list[str]] = {}
        for node in nodes:
            holders.setdefault(labels_of(node).get(wanted["key"], "no such label"), []).append(name_of(node))
        had = [value if value in names else f"{value} ({_names(names)})" for value, names in sorted(holders.items())]
        said.append(f"of {wanted['key']} there are {', '.join(had)}")
    return "; ".join(said)


def gpus_had(nodes: Sequence[Object]) -> str:
    """How many GPUs nodes have, free or not; empty if that is not known."""
    holders: dict[int, list[str]] = {}
    for node in nodes:
        count = int((node.get("status", {}).get("allocatable") or {}).get(GPU, 0))
        holders.setdefault(count, []).append(name_of(node))
    had = [f"{count or 'none'} ({_names(names)})" for count, names in sorted(holders.items(), reverse=True)]
    return f"in all, free or not, nodes have {', '.join(had)}" if had else ""


def _requirements(pod: Object) -> list[Mapping[str, Any]]:
    selector = pod["spec"].get("nodeSelector") or {}
    affinity = (pod["spec"].get("affinity") or {}).get("nodeAffinity") or {}
    terms = (affinity.get("requiredDuringSchedulingIgnoredDuringExecution") or {}).get("nodeSelectorTerms") or []
    return [
        *({"key": key, "value": value} for key, value in selector.items()),
        *(found for term in terms for found in term.get("matchExpressions") or []),
    ]


def _is_met(wanted: Mapping[str, Any], labels: Mapping[str, str]) -> bool:
    """By equality or `In`, which are the chart's; other operators are only told."""
    return labels.get(wanted["key"]) in (wanted.get("values") or [wanted.get("value")])


def _names(names: Sequence[str]) -> str:
    more = len(names) - _NAMES
    return ", ".join(names[:_NAMES]) + (f" and {more} more" if more > 0 else "")
