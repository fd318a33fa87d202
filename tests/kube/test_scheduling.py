"""Where the engine's pod goes, on the real node and on pretended ones (kwok); and what a release says it lacks."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import pytest

from kube.cluster import CHART, IMAGES, KEY_SECRET, RELEASE, TAG, Namespace, call, claim_on, node, values, wait

pytestmark = [pytest.mark.kube, pytest.mark.timeout(600)]

IN_AN_IMAGE = {"source": "oci", "pvc": {}, "oci": {"reference": f"{IMAGES}/demo-model:{TAG}", "pullPolicy": "Never"}}
"""A checkpoint that ties a pod to no node."""
MAX_Q = "NVIDIA-RTX-PRO-6000-Blackwell-Max-Q-Workstation-Edition"
OTHERS = {"a100": "NVIDIA-A100-SXM4-80GB", "max-q": MAX_Q, "h200": "NVIDIA-H200"}


@contextmanager
def pretended(products: Mapping[str, str], gpus: int) -> Iterator[None]:
    """Nodes that kwok keeps ready and pretends to run pods on, each with GPUs of its product."""
    room = {"cpu": "64", "memory": "512Gi", "pods": "110", "nvidia.com/gpu": str(gpus), "ephemeral-storage": "1Ti"}
    nodes = [
        {
            "apiVersion": "v1",
            "kind": "Node",
            "metadata": {
                "name": name,
                "annotations": {"kwok.x-k8s.io/node": "fake"},
                "labels": {
                    "kubernetes.io/hostname": name,
                    "kubernetes.io/os": "linux",
                    "nvidia.com/gpu.product": product,
                },
            },
            "status": {"capacity": room, "allocatable": room},
        }
        for name, product in products.items()
    ]
    call("kubectl", "apply", "-f", "-", stdin=json.dumps({"apiVersion": "v1", "kind": "List", "items": nodes}))
    try:
        call("kubectl", "wait", "--for=condition=Ready", "--timeout=60s", *(f"node/{name}" for name in products))
        yield
    finally:
        call("kubectl", "delete", "node", *products)


def placed(namespace: Namespace) -> str:
    """The node that the engine's pod was given."""
    return str(wait("the pod has a node", lambda: namespace.pod()["spec"].get("nodeName"), 60))


def scheduled(namespace: Namespace, gpus: int, **scheduling: object) -> None:
    """Installs a release whose image no node has: it is placed, and no engine starts."""
    namespace.install(
        values(
            image={"repository": f"{IMAGES}/absent", "pullPolicy": "Never"},
            model=IN_AN_IMAGE,
            engine={"device": "cuda", "gpus": gpus, "tensorParallelSize": gpus},
            preflight={"mode": "off"},
            scheduling={"nodeSelector": {}, **scheduling},
        )
    )


def test_of_nodes_with_room_it_takes_one_with_the_card_that_it_is_made_for(namespace: Namespace) -> None:
    with pretended(OTHERS, gpus=8):
        scheduled(namespace, 4)
        assert placed(namespace) == "max-q", "the real node has the card, and too few of it"
        namespace.helm("uninstall", RELEASE, "--wait")


def test_the_real_node_is_taken_for_its_label(namespace: Namespace) -> None:
    with pretended({"a100": OTHERS["a100"], "h200": OTHERS["h200"]}, gpus=8):
        scheduled(namespace, 2)
        assert placed(namespace) == node()


def test_another_card_may_be_asked_for_and_one_that_no_node_has_is_named(namespace: Namespace) -> None:
    with pretended(OTHERS, gpus=8):
        scheduled(namespace, 2, products=["NVIDIA-H200"])
        assert placed(namespace) == "h200"
        namespace.helm("uninstall", RELEASE, "--wait")
        scheduled(namespace, 2, products=["NVIDIA-B200"])
        words = wait("rollout names the card", lambda: named(namespace, "NVIDIA-B200"), 60)
        assert "4 nodes are not labelled nvidia.com/gpu.product In (NVIDIA-B200)" in words, words
        for name, product in OTHERS.items():
            assert f"{product} ({name})" in words, words


def test_too_few_free_gpus_are_counted_node_by_node(namespace: Namespace) -> None:
    with pretended({"max-q": MAX_Q}, gpus=2):
        scheduled(namespace, 4)
        words = wait("rollout counts GPUs", lambda: named(namespace, "too few free GPUs"), 60)
        assert "2 nodes have too few free GPUs, and the pod wants 4 of one node" in words, words
        assert f"nodes have 2 (max-q, {node()})" in words, words


def test_a_secret_that_is_not_there_is_named_before_and_after(namespace: Namespace) -> None:
    claim_on(namespace, "demo-model")
    given = values(auth={"existingSecret": "absent"}, preflight={"mode": "off"})
    notes = namespace.helm("upgrade", "--install", RELEASE, str(CHART), values=given)
    assert "No Secret `absent` was found" in notes
    words = wait("rollout names the Secret", lambda: named(namespace, "absent"), 60)
    assert "there is no Secret absent; make it, or correct auth.existingSecret" in words, words
    given = values(auth={"existingSecret": KEY_SECRET, "key": "absent-key"}, preflight={"mode": "off"})
    notes = namespace.helm("upgrade", RELEASE, str(CHART), values=given)
    assert f"Secret `{KEY_SECRET}` in namespace {namespace.name} has no key `absent-key`" in notes
    words = wait("rollout names the key", lambda: named(namespace, "absent-key"), 120)
    assert f"Secret {namespace.name}/{KEY_SECRET} has no key absent-key" in words, words


def test_a_claim_that_is_not_there_is_named_before_and_after(namespace: Namespace) -> None:
    given = values(model={"source": "pvc", "pvc": {"claimName": "absent"}})
    notes = namespace.helm("upgrade", "--install", RELEASE, str(CHART), values=given)
    assert "No PersistentVolumeClaim `absent` was found" in notes
    words = wait("rollout names the claim", lambda: named(namespace, "absent"), 60)
    assert "there is no PersistentVolumeClaim absent; make it, or correct model.pvc.claimName" in words, words


def test_a_kind_that_the_cluster_does_not_have_is_named_with_its_remedy(namespace: Namespace) -> None:
    """The cluster's own list without one kind: as a cluster without the operator has it."""
    claim_on(namespace, "demo-model")
    given = values(monitoring={"serviceMonitor": {"enabled": True}})
    crd = "servicemonitors.monitoring.coreos.com"
    definition = json.loads(call("kubectl", "get", "crd", crd, "-o", "json"))
    call("kubectl", "delete", "crd", crd)
    try:
        words = namespace.helm("upgrade", "--install", RELEASE, str(CHART), values=given, check=False)
    finally:
        metadata = {"name": crd, "annotations": definition["metadata"].get("annotations", {})}
        again = {**definition, "metadata": metadata}
        again.pop("status", None)
        call("kubectl", "create", "-f", "-", stdin=json.dumps(again))
        call("kubectl", "wait", "--for=condition=Established", "--timeout=60s", f"crd/{crd}")
    assert "monitoring.coreos.com/v1/ServiceMonitor, which this cluster does not have" in words, words
    assert "install the Prometheus operator's CRDs first" in words, words


def named(namespace: Namespace, name: str) -> str | None:
    """What `vqserve-ops rollout` says, once it fails for this."""
    code, words = namespace.rollout(10)
    return words if code == 1 and name in words else None
