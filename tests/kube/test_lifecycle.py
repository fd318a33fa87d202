"""Releases that are upgraded, that cannot start, and that go."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from kube.cluster import (
    CHART,
    CLASS,
    FOLDER,
    HOST,
    IMAGES,
    RELEASE,
    TAG,
    Namespace,
    Stream,
    call,
    claim_on,
    is_served,
    stream,
    values,
    wait,
)

pytestmark = [pytest.mark.kube, pytest.mark.timeout(1200)]

FULL = {
    "engine": {"device": "cuda", "gpus": 2},
    "resources": {"requests": {"cpu": "500m", "memory": "3Gi"}, "limits": {"memory": "8Gi"}},
}
"""Takes both of the node's GPUs; the image for CPUs serves with two ranks there."""
FRONT_DOOR = {"ingress": {"enabled": True, "className": CLASS, "hosts": [HOST]}}


@contextmanager
def damaged(namespace: Namespace, damage: str) -> Iterator[str]:
    """The name of a file that is damaged in the copy of the checkpoint in `scratch`."""
    folder = shutil.copytree(FOLDER, scratch(namespace))
    try:
        name = min(path.name for path in folder.glob("*.safetensors"))
        content = bytearray((folder / name).read_bytes())
        content[20 if damage == "header" else len(content) // 2] ^= 0x10
        (folder / name).write_bytes(content)
        yield name
    finally:
        shutil.rmtree(folder)


def scratch(namespace: Namespace) -> Path:
    """A folder of the node's for one namespace."""
    return Path("/var/tmp") / namespace.name


def pending(namespace: Namespace) -> str:
    """Why the scheduler does not place the engine's pod."""
    for condition in namespace.pod().get("status", {}).get("conditions", ()):
        if condition["type"] == "PodScheduled" and condition["status"] == "False":
            return str(condition.get("message", ""))
    return ""


def test_an_upgrade_of_a_full_node_finishes_its_streams_and_does_not_deadlock(namespace: Namespace) -> None:
    claim_on(namespace, "demo-model")
    # A slow core makes ten of the stream's tokens a second.
    namespace.install(values(drain={"seconds": 300}, **FULL, **FRONT_DOOR))
    namespace.wait_ready()
    wait("the front door leads to it", lambda: is_served(HOST), 60)
    before = namespace.pod()["metadata"]["name"]
    found: list[Stream] = []
    thread = threading.Thread(target=lambda: found.append(stream(HOST, tokens=1500)))
    thread.start()
    running = f"{before}:8001/proxy/metrics"
    wait(
        "a stream is running",
        lambda: any(
            line.startswith("vllm:num_requests_running") and line.endswith(" 1.0")
            for line in call(
                "kubectl", "get", "--raw", f"/api/v1/namespaces/{namespace.name}/pods/{running}"
            ).splitlines()
        ),
        60,
    )
    namespace.install(values(podAnnotations={"generation": "2"}, **FULL, **FRONT_DOOR))
    thread.join(330)
    assert found, "the stream was cut"
    assert found[0].done
    namespace.wait_ready()
    assert namespace.pod()["metadata"]["name"] != before
    assert namespace.rollout()[0] == 0
    with damaged(namespace, "bit") as name:
        claim_on(namespace, "damaged", str(scratch(namespace)))
        namespace.install(values(model={"source": "pvc", "pvc": {"claimName": "damaged"}}, **FULL, **FRONT_DOOR))
        wait("the preflight names the file", lambda: name in namespace.last_words("preflight"), 300)
        [engine] = namespace.pod()["status"]["containerStatuses"]
        assert "waiting" in engine["state"]
        namespace.helm("rollback", RELEASE, "1")
        namespace.wait_ready()
    assert "generation" not in namespace.pod()["metadata"].get("annotations", {})
    namespace.helm("uninstall", RELEASE, "--wait")
    kinds = "deployment,service,ingress,job,configmap,secret,serviceaccount,pvc,networkpolicy,poddisruptionbudget"
    left = {f"{item['kind']}/{item['metadata']['name']}" for item in namespace.get(kinds)["items"]}
    assert left - {"ConfigMap/kube-root-ca.crt", "ServiceAccount/default"} == {
        "Secret/vqserve-key",
        "PersistentVolumeClaim/demo-model",
        "PersistentVolumeClaim/damaged",
    }


def test_too_few_gpus_and_another_product_leave_it_pending(namespace: Namespace) -> None:
    claim_on(namespace, "demo-model")
    engine = {"device": "cuda", "gpus": 4, "tensorParallelSize": 4}
    namespace.install(values(engine=engine, scheduling={}))
    wait("it is pending for GPUs", lambda: "Insufficient nvidia.com/gpu" in pending(namespace), 60)
    code, said = namespace.rollout()
    assert code == 1
    assert "GPU" in said
    assert "4" in said
    namespace.install(values(engine={"device": "cuda", "gpus": 2}, scheduling={"products": ["NVIDIA-H100"]}))
    wait("it is pending for the product", lambda: "affinity" in pending(namespace), 90)


@pytest.mark.parametrize("damage", ["header", "bit"])
def test_a_damaged_checkpoint_is_refused_by_its_files_name(damage: str, namespace: Namespace) -> None:
    with damaged(namespace, damage) as name:
        claim_on(namespace, "demo-model", str(scratch(namespace)))
        namespace.install(values())
        wait("the preflight names the file", lambda: name in namespace.last_words("preflight"), 200)
        code, said = namespace.rollout()
        assert code == 1
        assert name in said
        namespace.install(values(preflight={"mode": "off"}))
        wait("the engine names the file", lambda: name in namespace.last_words("engine"), 200)
        assert not namespace.is_ready()


def test_too_little_memory_is_said_in_words_before_the_kernel_kills(namespace: Namespace) -> None:
    claim_on(namespace, "demo-model")
    namespace.install(values(resources={"limits": {"memory": "2Gi"}, "requests": {"cpu": "100m", "memory": "1Gi"}}))
    said = wait("the preflight's last words", lambda: namespace.last_words("preflight"), 200)
    assert "too little memory" in said
    code, words = namespace.rollout()
    assert code == 1
    assert "too little memory" in words


def test_the_checkpoint_may_be_an_image(namespace: Namespace) -> None:
    reference = f"{IMAGES}/demo-model:{TAG}"
    namespace.install(
        values(model={"source": "oci", "pvc": {}, "oci": {"reference": reference, "pullPolicy": "Never"}})
    )
    namespace.wait_ready()


def test_objects_of_every_kind_are_taken_by_the_api_server(namespace: Namespace) -> None:
    capable = ["monitoring.coreos.com/v1", "keda.sh/v1alpha1", "inference.networking.k8s.io/v1"]
    known = call("kubectl", "api-versions").split()
    assert set(capable) <= set(known), "the cluster lacks custom resources that the chart makes objects of"
    common = {
        "networkPolicy": {"enabled": True},
        "monitoring": {part: {"enabled": True} for part in ("serviceMonitor", "rules", "dashboards")},
        "route": {"enabled": True, "parentRefs": [{"name": "front"}], "hostnames": [HOST]},
        "inferencePool": {"enabled": True, "endpointPicker": {"name": "picker"}},
    }
    several = values(replicaCount=2, pdb={"enabled": True}, **common)
    scaled = values(
        autoscaling={"kind": "keda", "keda": {"serverAddress": "http://prometheus.monitoring:9090"}}, **common
    )
    kinds = ("NetworkPolicy", "ServiceMonitor", "PrometheusRule", "ConfigMap", "HTTPRoute", "InferencePool")
    for chosen, more in ((several, "PodDisruptionBudget"), (scaled, "ScaledObject")):
        rendered = namespace.helm("template", RELEASE, str(CHART), "--validate", values=chosen)
        for kind in (*kinds, more):
            assert f"kind: {kind}\n" in rendered
        namespace.kubectl("apply", "--dry-run=server", "-f", "-", stdin=rendered)
