"""A support bundle holds what explains a release, and no secret of it."""

from __future__ import annotations

import base64
import gzip
import json
import stat
import tarfile
from pathlib import Path
from typing import Any

import pytest

from ops.fake_cluster import FakeCluster
from ops.objects import Made, deployment, pod, replica_set
from vqserve_ops.bundle.helm import newest, unpacked
from vqserve_ops.bundle.redact import REMOVED, redacted, redacted_text
from vqserve_ops.cli import main

OWN = {
    "app.kubernetes.io/instance": "glm",
    "app.kubernetes.io/component": "engine",
    "app.kubernetes.io/part-of": "vqserve",
}
KEY = "correct-horse-battery"


def helm_secret(release: dict[str, Any], version: int) -> Made:
    packed = base64.b64encode(base64.b64encode(gzip.compress(json.dumps(release).encode()))).decode()
    labels = {"owner": "helm", "name": "glm", "version": str(version)}
    return {
        "metadata": {"name": f"v{version}", "labels": labels},
        "type": "helm.sh/release.v1",
        "data": {"release": packed},
    }


RELEASE = {
    "version": 2,
    "config": {"auth": {"existingSecret": "glm-key"}, "engine": {"env": [{"name": "HF_TOKEN", "value": "abc123"}]}},
    "manifest": "kind: Secret\nmetadata: {name: s}\ndata: {a: aGlkZGVu}\n---\nkind: Service\nmetadata: {name: glm}\n",
    "chart": {"metadata": {"version": "0.1.0"}},
}


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> FakeCluster:
    engine, one, owner = deployment(), pod(), replica_set()
    for thing in (engine, one, owner):
        thing["metadata"].setdefault("labels", {}).update(OWN)
    source = {"secretKeyRef": {"name": "glm-key", "key": "api-key"}}
    one["spec"]["containers"][0] |= {
        "env": [{"name": "VLLM_API_KEY", "valueFrom": source}, {"name": "HF_TOKEN", "value": "visible-token"}],
        "args": ["serve", "/model", "--api-key", "inline-secret", "--port", "8001"],
    }
    secret = {"metadata": {"name": "glm-key"}, "data": {"api-key": base64.b64encode(KEY.encode()).decode()}}
    fake = FakeCluster({
        "Deployment": [engine], "Pod": [one], "ReplicaSet": [owner],
        "Secret": [secret, helm_secret({"version": 1}, 1), helm_secret(RELEASE, 2)],
        "ConfigMap": [{"metadata": {"name": "c", "labels": OWN}, "data": {"password": "pass-in-map"}}],
    })  # fmt: skip
    fake.logs = {
        ("glm-1", "engine", False): f"got key {KEY}\nAuthorization: Bearer whatever.it.is\nmax_tokens: 100\n",
        ("glm-1", "engine", True): "vqserve: error: /model/x: expected 3 bytes, found 2\n",
    }
    monkeypatch.setattr("vqserve_ops.bundle.command.Cluster", lambda _: fake)
    return fake


def bundle(tmp_path: Path) -> dict[str, str]:
    path = tmp_path / "b.tar.gz"
    assert main(["support-bundle", "glm", "--output", str(path)]) == 0
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    files = {}
    with tarfile.open(path) as archive:
        for member in archive:
            file = archive.extractfile(member)
            assert file is not None
            files[member.name.partition("/")[2]] = file.read().decode()
    return files


def test_a_bundle_explains_and_holds_no_secret(cluster: FakeCluster, tmp_path: Path) -> None:
    files = bundle(tmp_path)
    together = "".join(files.values())
    for secret in (KEY, "visible-token", "inline-secret", "pass-in-map", "whatever.it.is", "abc123", "aGlkZGVu"):
        assert secret not in together, secret
    assert "max_tokens: 100" in files["logs/glm-1/engine.log"]
    assert "expected 3 bytes" in files["logs/glm-1/engine.previous.log"]
    assert "existingSecret: glm-key" in files["helm/values.yaml"]
    assert "kind: Service" in files["helm/manifest.yaml"]
    assert json.loads(files["versions.json"])["kubernetes"] == "v1.34.4"
    assert json.loads(files["objects/Pod.json"])[0]["spec"]["containers"][0]["args"][3] == REMOVED
    assert "objects/Secret.json" not in files
    assert "rollout.txt" in files


def test_what_this_user_may_not_see_is_said(cluster: FakeCluster, tmp_path: Path) -> None:
    cluster.forbidden = {"Secret", "ConfigMap"}
    files = bundle(tmp_path)
    assert "ConfigMap: may not list" in files["left-out.txt"]
    assert "Secret glm-key was not searched for" in files["left-out.txt"]
    assert "helm/values.yaml" not in files


@pytest.mark.parametrize(
    "text",
    [
        "Authorization: Bearer SECRETSECRET",
        '"authorization": "Basic SECRETSECRET"',
        "api_key='SECRETSECRET', port=1",
        "HF_TOKEN=SECRETSECRET vllm serve",
        "--api-key SECRETSECRET --port 1",
        "--hf-token=SECRETSECRET",
        "https://store/x?sig=SECRETSECRET&se=1",
        "https://user:SECRETSECRET@host/x",
        "found hf_SECRETSECRETSECRETSECRET",
        "eyJhbGciOiJI.SECRETSECRET.SECRETSECRET",
        "-----BEGIN RSA PRIVATE KEY-----\nSECRETSECRET\n-----END RSA PRIVATE KEY-----",
        "password: SECRETSECRET",
        "AWS_SECRET_ACCESS_KEY: SECRETSECRET",
    ],
)
def test_what_looks_like_a_secret_goes(text: str) -> None:
    assert "SECRETSECRET" not in redacted_text(text)
    assert REMOVED in redacted_text(text)


@pytest.mark.parametrize(
    "text",
    [
        "max_tokens=4096, prompt_tokens: 12",
        'secret "glm-key" not found',
        "api_key=None",
        "GET /v1/models HTTP/1.1 200",
        "tokenizer: /model/tokenizer.json",
        "couldn't find key api-key in Secret llm/glm-key",
    ],
)
def test_what_explains_stays(text: str) -> None:
    assert redacted_text(text) == text


def test_names_of_secrets_stay_and_values_go() -> None:
    value = {"auth": {"existingSecret": "k"}, "secretName": "t", "apiKey": "x", "password": "", "token": None}
    assert redacted(value) == value | {"apiKey": REMOVED}


def test_the_newest_release_counts_and_a_broken_one_is_empty() -> None:
    secrets = [helm_secret({"version": 9}, 9), helm_secret({"version": 10}, 10)]
    found = newest(secrets)
    assert found is not None
    assert unpacked(found) == {"version": 10}
    assert unpacked({"data": {"release": "!"}}) == {}
