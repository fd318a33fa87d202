"""Finds what belongs to a release of the chart, by its labels."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence

from vqserve.format.errors import UsageError
from vqserve_ops.cluster import Cluster
from vqserve_ops.objects import Object, annotations_of, labels_of

INSTANCE = "app.kubernetes.io/instance"
COMPONENT = "app.kubernetes.io/component"
PART_OF = "app.kubernetes.io/part-of"
_HASH = "pod-template-hash"
_REVISION = "deployment.kubernetes.io/revision"


def add_release(parser: argparse.ArgumentParser) -> None:
    """Declares which release is meant."""
    parser.add_argument("release", metavar="RELEASE", help="name of the helm release")
    parser.add_argument("-n", "--namespace", metavar="NAME", help="default: the one that KUBECONFIG has")


def engine_of(cluster: Cluster, release: str) -> Object:
    """The Deployment of a release's engine.

    Raises:
        UsageError: There is none.
    """
    found = cluster.listed("Deployment", {INSTANCE: release, COMPONENT: "engine", PART_OF: "vqserve"})
    if not found:
        problem = f"no release {release} of the chart vqserve"
        raise UsageError(f"namespace {cluster.namespace}: {problem}; `helm list --all-namespaces` has them all")
    return found[0]


def selector_of(deployment: Object) -> Mapping[str, str]:
    """The labels of its pods."""
    labels: Mapping[str, str] = deployment["spec"]["selector"]["matchLabels"]
    return labels


def current_set(deployment: Object, sets: Sequence[Object]) -> Object | None:
    """The ReplicaSet of the Deployment's present template; None if it is not made yet."""
    revision = annotations_of(deployment).get(_REVISION)
    for candidate in sets:
        owners = candidate["metadata"].get("ownerReferences") or []
        owned = any(owner.get("uid") == deployment["metadata"].get("uid") for owner in owners)
        if owned and annotations_of(candidate).get(_REVISION) == revision:
            return candidate
    return None


def pods_of(replica_set: Object | None, pods: Sequence[Object]) -> list[Object]:
    """Those pods that a ReplicaSet made and that are not going."""
    if replica_set is None:
        return []
    digest = labels_of(replica_set).get(_HASH)
    return [pod for pod in pods if labels_of(pod).get(_HASH) == digest and "deletionTimestamp" not in pod["metadata"]]
