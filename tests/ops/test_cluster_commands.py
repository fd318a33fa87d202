"""Drain, preflight and rollout against a cluster in memory; the real one is tests/kube's."""

from __future__ import annotations

import io
import subprocess
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import yaml

from chart.helm import CI, objects, of_kind, rendered
from ops.fake_cluster import FakeCluster
from ops.objects import Made, deployment, replica_set, state
from ops.objects import pod as made_pod
from vqserve_ops import preflight
from vqserve_ops.cli import COMMANDS, main
from vqserve_ops.drain import asked, requests_in

Capture = pytest.CaptureFixture[str]
LABELS = {
    "app.kubernetes.io/instance": "glm",
    "app.kubernetes.io/component": "engine",
    "app.kubernetes.io/part-of": "vqserve",
}
READY = [{"type": "Ready", "status": "True"}]
USERS = ("drain", "preflight", "rollout.command", "bundle.command")


def engine_pod(name: str = "glm-1", **more: Any) -> Made:
    made = made_pod(**more)
    made["metadata"] |= {"name": name, "labels": LABELS | {"pod-template-hash": "h1"}}
    return made


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> FakeCluster:
    fake = FakeCluster()
    engine = deployment(replicas=1, updatedReplicas=1, availableReplicas=1)
    engine["metadata"]["labels"] = LABELS
    fake.objects = {"Deployment": [engine], "ReplicaSet": [replica_set()], "Pod": [engine_pod(conditions=READY)]}
    fake.objects["ReplicaSet"][0]["metadata"]["labels"] |= LABELS
    for user in USERS:
        monkeypatch.setattr(f"vqserve_ops.{user}.Cluster", lambda _: fake)
        if user != "bundle.command":
            monkeypatch.setattr(f"vqserve_ops.{user}._LOOK", 0)
    return fake


def error_of(capsys: Capture) -> str:
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error.removeprefix("vqserve-ops: error: ")


@pytest.mark.parametrize("command", COMMANDS)
def test_every_subcommand_explains_itself(command: str, capsys: Capture) -> None:
    with pytest.raises(SystemExit) as end:
        main([command, "--help"])
    assert end.value.code == 0
    assert f"usage: vqserve-ops {command}" in capsys.readouterr().out


def test_without_a_cluster_it_is_one_line(capsys: Capture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "none"))
    monkeypatch.setenv("HOME", str(tmp_path))
    assert main(["rollout", "glm"]) == 2
    assert error_of(capsys).startswith("no cluster is configured")


def test_a_release_that_is_not_there_is_one_line(cluster: FakeCluster, capsys: Capture) -> None:
    for command in ("rollout", "drain", "support-bundle", "preflight"):
        assert main([command, "other"]) == 2
        assert error_of(capsys).startswith("namespace llm: no release other of the chart vqserve; ")


def test_a_rollout_that_is_done_ends_with_0(cluster: FakeCluster, capsys: Capture) -> None:
    assert main(["rollout", "glm"]) == 0
    assert capsys.readouterr().out == "glm-vqserve: 1 of 1 replicas updated, 1 serve\nglm-1: serves\n"


def test_a_rollout_that_does_not_get_there_says_why_once(cluster: FakeCluster, capsys: Capture) -> None:
    cluster.objects["Deployment"][0]["status"]["availableReplicas"] = 0
    waiting = {"reason": "ErrImagePull", "message": "not found"}
    cluster.objects["Pod"] = [engine_pod(engine=state(waiting=waiting))]
    assert main(["rollout", "glm", "--timeout", "0.05"]) == 1
    printed = capsys.readouterr()
    assert printed.out.count("there is no image r/serve:1") == 1
    assert "release glm does not serve (not in 0 s): glm-1: engine: there is no image r/serve:1" in printed.err


def metrics(running: int) -> str:
    return (
        "# HELP vllm:num_requests_running x\n"
        f'vllm:num_requests_running{{engine="0",model_name="glm"}} {running}.0\n'
        'vllm:num_requests_waiting{engine="0",model_name="glm"} 0.0\n'
    )


def test_a_drain_waits_for_the_requests(cluster: FakeCluster, capsys: Capture) -> None:
    cluster.metrics = [metrics(2), metrics(0), metrics(1), metrics(0)]
    assert main(["drain", "glm"]) == 0
    assert cluster.executed[0] == ["glm-1", "engine", "vqserve", "drain", "--port", "8001"]
    assert {tuple(command[:3]) for command in cluster.executed[1:]} == {("glm-1", "engine", "python3")}
    out = capsys.readouterr().out.splitlines()
    assert out[0] == "glm-1: draining: asked for"
    assert [line.split()[1] for line in out[1:5]] == ["2", "0", "1", "0"]


def test_the_pod_is_asked_from_within_and_past_any_proxy() -> None:
    class Metrics(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(f"{self.path} {metrics(3)}".encode())

        def log_message(self, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Metrics) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        command = [sys.executable, *asked(server.server_port)[1:]]
        done = subprocess.run(command, env={"http_proxy": "http://127.0.0.1:9"}, capture_output=True, text=True)
        server.shutdown()
    assert done.stdout.startswith("/metrics ")
    assert requests_in(done.stdout) == 3


def test_a_drain_that_cannot_be_seen_or_takes_too_long_is_one_line(cluster: FakeCluster, capsys: Capture) -> None:
    cluster.metrics = [metrics(3)]
    assert main(["drain", "glm", "--timeout", "0"]) == 1
    assert "3 requests are left after 0 s; " in error_of(capsys)
    cluster.metrics = ["nothing"]
    assert main(["drain", "glm"]) == 1
    assert "do not tell of requests" in error_of(capsys)
    cluster.answer = (2, "vqserve: error: no server\n")
    assert main(["drain", "glm"]) == 1
    assert "cannot be drained (vqserve: error: no server)" in error_of(capsys)


def test_of_several_pods_one_has_to_be_named(cluster: FakeCluster, capsys: Capture) -> None:
    cluster.objects["Pod"].append(engine_pod("glm-2", conditions=READY))
    cluster.metrics = [metrics(0)]
    assert main(["drain", "glm"]) == 2
    assert "found glm-1, glm-2; name one by --pod" in error_of(capsys)
    assert main(["drain", "glm", "--pod", "glm-2"]) == 0
    assert main(["drain", "glm", "--pod", "glm-3"]) == 2


@pytest.mark.parametrize("values", CI, ids=lambda path: path.name)
def test_the_jobs_pod_is_the_engines_but_for_its_container(values: Path) -> None:
    engine = of_kind("Deployment", objects(rendered("--values", values)))
    before = yaml.safe_dump(engine)
    job, _ = preflight.job_of(engine, lambda _: True, 60)
    assert yaml.safe_dump(engine) == before
    spec, was = job["spec"]["template"]["spec"], engine["spec"]["template"]["spec"]
    [container] = spec["containers"]
    assert container["args"][:2] == ["preflight", "/model"]
    assert container["args"][container["args"].index("--mode") + 1] == "refuse"
    assert container["resources"] == was["containers"][0]["resources"]
    assert container["image"] == was["containers"][0]["image"]
    assert all("valueFrom" not in variable for variable in container["env"])
    for key in ("affinity", "tolerations", "nodeSelector", "securityContext", "volumes", "runtimeClassName"):
        assert spec.get(key) == was.get(key)
    assert spec["restartPolicy"] == "Never"
    assert not job["metadata"]["labels"].items() >= engine["spec"]["selector"]["matchLabels"].items()


def test_before_an_install_claims_that_are_not_there_are_left_out() -> None:
    [values] = [path for path in CI if path.name == "download-values.yaml"]
    job, notes = preflight.job_of(of_kind("Deployment", objects(rendered("--values", values))), lambda _: False, 60)
    spec = job["spec"]["template"]["spec"]
    assert "/model" not in spec["containers"][0]["args"]
    assert not any("persistentVolumeClaim" in volume for volume in spec["volumes"])
    assert len(notes) == 1


def ending(code: int, message: str) -> Any:
    def on_create(cluster: FakeCluster, job: Made) -> None:
        ended = {"exitCode": code, "message": message, "reason": "Error"}
        pod = {
            "metadata": {"name": "p", "uid": "u", "labels": {"batch.kubernetes.io/job-name": job["metadata"]["name"]}},
            "spec": {"containers": []},
            "status": {"containerStatuses": [{"name": "preflight", "state": {"terminated": ended}}]},
        }
        cluster.objects["Pod"].append(pod)
        cluster.logs["p", "preflight", False] = "ok  vLLM\n"

    return on_create


@pytest.mark.parametrize("code", [0, 1])
def test_a_preflight_shows_the_log_explains_and_removes_the_job(
    cluster: FakeCluster, capsys: Capture, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    cluster.on_create = ending(code, "preflight: 1 failed\nFAIL: driver: 550 -> install 580\n")
    text = rendered("--values", CI[0])
    monkeypatch.setattr("sys.stdin", io.StringIO(text))
    assert main(["preflight", "--rendered", "-"]) == code
    printed = capsys.readouterr()
    assert "ok  vLLM\n" in printed.out
    [(kind, name)] = cluster.deleted
    assert kind == "Job"
    assert name == cluster.objects["Job"][0]["metadata"]["name"]
    if code:
        assert printed.err.endswith("the node cannot serve so: driver: 550 -> install 580\n")


def test_a_preflight_that_finds_no_node_says_why(cluster: FakeCluster, capsys: Capture, tmp_path: Path) -> None:
    path = tmp_path / "rendered.yaml"
    path.write_text(rendered("--values", CI[0]))
    assert main(["preflight", "--rendered", str(path), "--timeout", "0"]) == 1
    assert "has not run in 0 s" in error_of(capsys)
    assert len(cluster.deleted) == 1
    path.write_text("kind: List\n")
    assert main(["preflight", "--rendered", str(path)]) == 2
    assert "holds no Deployment of the chart" in error_of(capsys)
    assert main(["preflight"]) == 2
