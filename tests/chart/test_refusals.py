"""Values that cannot work end at template time: single ones by the schema, combinations by a line with the remedy."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from chart.helm import APIS, CHART, helm, refused

Changes = dict[str, Any]

GPU: Changes = {"model": {"pvc": {"claimName": "glm"}}}
CPU: Changes = GPU | {"engine": {"device": "cpu", "gpus": 0}}


def changed(base: Changes, changes: Changes) -> Changes:
    """`base` with the values of dotted paths set."""
    values: Changes = {}
    for path, value in [*_flat(base), *changes.items()]:
        *sections, name = path.split(".")
        place = values
        for section in sections:
            place = place.setdefault(section, {})
        place[name] = value
    return values


def _flat(tree: Changes, prefix: str = "") -> list[tuple[str, Any]]:
    flat: list[tuple[str, Any]] = []
    for name, value in tree.items():
        flat += _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else [(f"{prefix}{name}", value)]
    return flat


IMPOSSIBLE: list[tuple[Changes, Changes, str]] = [
    (GPU, {"loadtest.enabled": True, "loadtest.profile": "saturation"}, "set loadtest.workers to 1"),
    (GPU, {"loadtest.hostHeader": "glm.example.com"}, "set loadtest.host to the ingress's address"),
    (CPU, {"engine.gpus": 2}, "set engine.gpus to 0, or engine.device to cuda"),
    (CPU, {"engine.attention": "sparse"}, "set it to dense, or engine.device to cuda"),
    (CPU, {"engine.gpuMemoryUtilization": 0.9}, "VLLM_CPU_KVCACHE_SPACE in engine.env"),
    (CPU, {"scheduling.dra.enabled": True}, "set scheduling.dra.enabled to false"),
    (CPU, {"engine.pcie": "noP2P"}, "with engine.gpus 0 no GPU talks to another: set it to default"),
    (CPU, {"engine.expertParallel": True}, "there is one rank: set it to false, or raise engine.gpus"),
    (GPU, {"engine.gpus": 0}, "set engine.gpus to the GPUs of a replica, or engine.device to cpu"),
    (GPU, {"engine.tensorParallelSize": 1}, "make them equal, or leave engine.tensorParallelSize out"),
    (GPU, {"engine.maxModelLen": 8192}, "set it to at most 4096, or engine.attention to sparse"),
    (GPU, {"engine.maxModelLen": 1048576}, "engine.maxModelLen is 1048576, and dense"),
    (GPU, {"engine.gpus": 1, "engine.expertParallel": True}, "there is one rank"),
    (GPU, {"engine.gpus": 1, "engine.pcie": "noP2P"}, "set it to default"),
    (GPU, {"engine.warmUpSeconds": 3600}, "raise that, or lower engine.warmUpSeconds"),
    (GPU, {"engine.extraArgs": ["--api-key=secret"]}, "engine.extraArgs has --api-key: take it out and set auth.exist"),
    (GPU, {"engine.extraArgs": ["--max_model_len", "1"]}, "take it out and set engine.maxModelLen"),
    (GPU, {"engine.extraArgs": ["-tp", "4"]}, "engine.extraArgs has -tp: take it out and set engine.gpus"),
    (
        GPU,
        {"engine.extraArgs": ["--custom-histogram-buckets={}"], "monitoring.rules.enabled": True},
        "rules read the bounds that vLLM has by itself: take it out, or set monitoring.rules.enabled to false",
    ),
    (GPU, {"engine.env": [{"name": "VLLM_API_KEY", "value": "x"}]}, "take it out and set auth.existingSecret"),
    (GPU, {"engine.env": [{"name": "HOME", "value": "/"}]}, "engine.env has HOME, which the chart sets: take it out"),
    (GPU, {"resources.limits": {"nvidia.com/gpu": 2}}, "take it out; engine.gpus sets it"),
    (GPU, {"model.pvc.claimName": ""}, "model.source is pvc and model.pvc.claimName is empty: set it"),
    (GPU, {"model.source": "oci"}, "model.source is oci and model.oci.reference is empty"),
    (GPU, {"model.source": "download"}, "model.source is download and model.download.url is empty"),
    (GPU, {"model.hostPath.path": "/srv"}, "set model.source to hostPath, or leave model.hostPath.path empty"),
    (
        {"model": {"source": "hostPath", "hostPath": {"path": "/srv"}}},
        {},
        "PodSecurity restricted refuses: take a local PersistentVolume",
    ),
    (GPU, {"autoscaling.kind": "hpa", "replicaCount": 2}, "leave replicaCount out and set autoscaling.minReplicas"),
    (GPU, {"autoscaling.kind": "hpa", "autoscaling.minReplicas": 3}, "lower one or raise the other"),
    (GPU, {"autoscaling.kind": "keda"}, "autoscaling.keda.serverAddress is empty: set it to the Prometheus"),
    (
        GPU,
        {"autoscaling.kind": "keda", "autoscaling.keda.serverAddress": "http://prometheus"},
        "the labels that a ServiceMonitor gives: set monitoring.serviceMonitor.enabled, too",
    ),
    (
        GPU,
        {
            "autoscaling.kind": "keda",
            "autoscaling.keda.serverAddress": "http://prometheus",
            "autoscaling.keda.authenticationRef": {"name": "prometheus"},
            "monitoring.serviceMonitor.enabled": True,
        },
        "set it to what Prometheus is sent, as bearer, basic or tls",
    ),
    (GPU, {"replicaCount": 2, "cache.kind": "pvc"}, "or set cache.kind to emptyDir"),
    (
        {"model": {"source": "download", "download": {"url": "https://models.example/glm"}}},
        {"replicaCount": 2},
        "model.download.volume.accessModes lacks ReadWriteMany",
    ),
    (GPU, {"ingress.enabled": True}, "name at least one"),
    (GPU, {"route.enabled": True}, "name one, as [{name: my-gateway}]"),
    (GPU, {"inferencePool.enabled": True}, "install an endpoint picker and name its Service"),
    (
        GPU,
        {"inferencePool.enabled": True, "inferencePool.endpointPicker.name": "picker"},
        "set route.enabled and route.parentRefs, too",
    ),
    (
        GPU,
        {"networkPolicy.enabled": True, "tracing.endpoint": "http://collector:4317"},
        "allow the collector in networkPolicy.egress",
    ),
    (GPU, {"monitoring.rules.enabled": True}, "set monitoring.serviceMonitor.enabled, too"),
    (GPU, {"scheduling.affinity": {"nodeAffinity": {"x": []}}}, "set scheduling.products to []"),
]


@pytest.fixture(scope="module")
def errors(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """How rendering ends, case by case."""
    return [refused(changed(base, changes), tmp_path_factory.mktemp("values")) for base, changes, _ in IMPOSSIBLE]


@pytest.mark.parametrize("case", range(len(IMPOSSIBLE)), ids=lambda case: str(IMPOSSIBLE[case][1] or case))
def test_values_that_cannot_work_together_are_refused_with_the_remedy(case: int, errors: list[str]) -> None:
    assert IMPOSSIBLE[case][2] in errors[case]


def test_every_refusal_has_a_case(errors: list[str]) -> None:
    written = re.findall(
        r'fail (?:\(printf )?"((?:[^"\\]|\\.)*)"', (CHART / "templates/_checks.tpl").read_text("utf-8")
    )
    assert len(written) > 30
    of_their_own = ("begins with a digit", "has no image volumes", "which this cluster does not have")  # tested below
    for text in written:
        pattern = re.sub("%[ds]", ".+", re.escape(text.replace('\\"', '"')))
        assert any(part in text for part in of_their_own) or any(re.search(pattern, error) for error in errors), text


@pytest.mark.parametrize("api", APIS)
def test_an_api_that_the_cluster_lacks_is_named(api: str, tmp_path: Path) -> None:
    changes: dict[str, Changes] = {
        "HTTPRoute": {"route.enabled": True, "route.parentRefs": [{"name": "public"}]},
        "InferencePool": {
            "inferencePool.enabled": True,
            "inferencePool.endpointPicker.name": "picker",
            "route.enabled": True,
            "route.parentRefs": [{"name": "public"}],
        },
        "ScaledObject": {
            "autoscaling.kind": "keda",
            "autoscaling.keda.serverAddress": "http://prometheus",
            "monitoring.serviceMonitor.enabled": True,
        },
        "PrometheusRule": {"monitoring.serviceMonitor.enabled": True, "monitoring.rules.enabled": True},
        "ServiceMonitor": {"monitoring.serviceMonitor.enabled": True},
        "ResourceClaimTemplate": {"scheduling.dra.enabled": True},
    }
    error = refused(changed(GPU, changes[api.rpartition("/")[2]]), tmp_path, apis=[one for one in APIS if one != api])
    assert f"needs {api}, which this cluster does not have" in error
    assert f"--api-versions {api}" in error


def test_image_volumes_need_a_kubernetes_that_has_them(tmp_path: Path) -> None:
    values = {"model": {"source": "oci", "oci": {"reference": "registry.example/glm:1"}}}
    assert "Kubernetes v1.32.4 has no image volumes" in refused(values, tmp_path, "--kube-version", "v1.32.4")


def test_a_release_whose_name_is_no_services_is_refused_until_another_is_given() -> None:
    arguments = ("template", "5.2", CHART, "--set", "model.pvc.claimName=glm")
    assert "5-2-vqserve begins with a digit, and no Service's name may: set fullnameOverride" in helm(*arguments).stderr
    assert helm(*arguments, "--set", "fullnameOverride=glm").returncode == 0


@pytest.mark.parametrize(
    "changes",
    [
        {"replicas": 2},
        {"engine.gpu": 2},
        {"engine.gpus": "2"},
        {"engine.gpus": -1},
        {"engine.maxModelLen": 0},
        {"engine.tensorParallelSize": 0},
        {"engine.gpuMemoryUtilization": 1.5},
        {"engine.attention": "flash"},
        {"engine.device": "rocm"},
        {"engine.servedModelName": "it's"},
        {"engine.extraArgs": "--max-num-seqs 8"},
        {"model.source": "s3"},
        {"model.download.manifestSha256": "latest"},
        {"image.digest": "9f86d0"},
        {"image.pullPolicy": "Sometimes"},
        {"preflight.mode": False},  # what YAML 1.1 makes of an `off` without quotes
        {"service.port": 65536},
        {"shm.size": "8 GB"},
        {"drain.seconds": 0},
        {"probes.liveness.path": "health"},
        {"cache.accessModes": []},
        {"nameOverride": "glm.5"},
        {"fullnameOverride": "5-glm"},
        {"fullnameOverride": "g" * 41},
        {"pdb": None},
        {"scheduling.dra": None},
        {"model.download.volume.accessModes": ["ReadWriteOncePod"]},  # the Job's pod and the engine's mount it
        {"podSecurity.runAsUser": 0},
        {"monitoring.serviceMonitor.interval": "soon"},
        {"monitoring.rules.slo.ttftSeconds": 3},  # between two buckets
        {"monitoring.rules.slo.interTokenSeconds": 0.11},
        {"monitoring.rules.slo.objective": 0.9},
        {"monitoring.rules.stallSeconds": 0},
        {"monitoring.rules.runbooks": "see the wiki"},
    ],
    ids=str,
)
def test_a_value_that_cannot_be_is_refused_by_the_schema(changes: Changes, tmp_path: Path) -> None:
    error = refused(changed(GPU, changes), tmp_path)
    assert "values don't meet the specifications of the schema" in error
    assert next(iter(changes)).rpartition(".")[2] in error
