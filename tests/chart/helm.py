"""What the chart's tests ask of helm, and how they read its answers."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

CHART = Path(__file__).parents[2] / "charts" / "vqserve"
CI = sorted((CHART / "ci").glob("*-values.yaml"))
APIS = [
    "gateway.networking.k8s.io/v1/HTTPRoute",
    "inference.networking.k8s.io/v1/InferencePool",
    "keda.sh/v1alpha1/ScaledObject",
    "monitoring.coreos.com/v1/PrometheusRule",
    "monitoring.coreos.com/v1/ServiceMonitor",
    "resource.k8s.io/v1/ResourceClaimTemplate",
]
"""What a cluster may have or not, and these tests' has."""

Object = dict[str, Any]


def helm(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Runs helm: the one that HELM names (Helm 4 has to render the same), or the installed one."""
    beside = Path(sys.executable).with_name("helm")
    program = os.environ.get("HELM") or (str(beside) if beside.exists() else shutil.which("helm"))
    assert program, "no helm: `make test` installs it"
    return subprocess.run([program, *arguments], capture_output=True, text=True, check=False)


def rendered(*arguments: str | Path, chart: Path = CHART, apis: list[str] = APIS, release: str = "demo") -> str:
    """What `helm template` prints."""
    cluster = ["--kube-version=v1.34.0", *(f"--api-versions={api}" for api in apis)]
    done = helm("template", release, chart, "--namespace", "llm", *cluster, *arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout


def refused(values: Object, tmp_path: Path, *arguments: str, apis: list[str] = APIS) -> str:
    """The error with which rendering ends."""
    file = written(values, tmp_path)
    done = helm("template", "demo", CHART, "--values", file, *(f"--api-versions={api}" for api in apis), *arguments)
    assert done.returncode != 0
    assert done.stdout == ""
    return done.stderr


def written(values: Object, tmp_path: Path) -> Path:
    file = tmp_path / "values.yaml"
    file.write_text(yaml.safe_dump(values), encoding="utf-8")
    return file


def objects(text: str) -> list[Object]:
    return [item for item in yaml.safe_load_all(text) if item]


def of_kind(kind: str, found: list[Object]) -> Object:
    [one] = [item for item in found if item["kind"] == kind]
    return one


def pod_specs(found: list[Object]) -> list[Object]:
    """Of every pod that some object is or makes."""
    pods = [item["spec"] for item in found if item["kind"] == "Pod"]
    return pods + [item["spec"]["template"]["spec"] for item in found if item["kind"] in ("Deployment", "Job")]
