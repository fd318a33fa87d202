"""The Kubernetes client against an API server of a few canned answers: JSON comes through, errors are one line."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import ClassVar
from urllib.parse import unquote

import pytest
import yaml

from vqserve.format.errors import UsageError
from vqserve_ops.cluster import Cluster, ForbiddenError
from vqserve_ops.errors import FailedError

PODS = "/api/v1/namespaces/llm/pods"


class Api(BaseHTTPRequestHandler):
    answers: ClassVar[dict[str, tuple[int, str]]] = {}
    asked: ClassVar[list[tuple[str, str, str]]] = []

    def answer(self) -> None:
        path, _, query = self.path.partition("?")
        path, query = unquote(path), unquote(query)
        length = int(self.headers.get("Content-Length", 0))
        self.asked.append((self.command, path, self.rfile.read(length).decode() if length else query))
        status, body = self.answers.get(path, (404, '{"message": "not found"}'))
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body.encode())

    do_GET = do_POST = do_DELETE = answer

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def api(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Api]]:
    Api.answers, Api.asked = {}, []
    server = HTTPServer(("127.0.0.1", 0), Api)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    configured = {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "c",
        "clusters": [{"name": "c", "cluster": {"server": f"http://127.0.0.1:{server.server_port}"}}],
        "users": [{"name": "u", "user": {"token": "t"}}],
        "contexts": [{"name": "c", "context": {"cluster": "c", "user": "u", "namespace": "llm"}}],
    }
    path = tmp_path / "kubeconfig"
    path.write_text(yaml.safe_dump(configured))
    monkeypatch.setenv("KUBECONFIG", str(path))
    yield Api
    server.shutdown()
    thread.join()
    server.server_close()


def test_objects_come_as_the_api_has_them(api: type[Api]) -> None:
    pod = {"metadata": {"name": "p"}, "status": {"unknownToTheClient": 1}}
    api.answers = {PODS: (200, json.dumps({"items": [pod]})), f"{PODS}/p": (200, json.dumps(pod))}
    cluster = Cluster(None)
    assert cluster.namespace == "llm"
    assert cluster.listed("Pod", {"a/b": "c"}) == [pod]
    assert api.asked[-1] == ("GET", PODS, "labelSelector=a/b=c")
    assert cluster.get("Pod", "p") == pod
    assert cluster.get("Pod", "other") is None


def test_logs_are_text_and_a_missing_one_is_empty(api: type[Api]) -> None:
    api.answers = {f"{PODS}/p/log": (200, "one\ntwo\n"), f"{PODS}/q/log": (400, "{}")}
    cluster = Cluster("llm")
    assert cluster.log("p", "engine", previous=True, lines=5) == "one\ntwo\n"
    assert api.asked[-1][2] == "container=engine&previous=true&tailLines=5"
    assert cluster.log("q", "engine") == ""
    assert cluster.log("r", "engine") == ""


def test_a_job_is_made_and_removed_with_its_pods(api: type[Api]) -> None:
    jobs = "/apis/batch/v1/namespaces/llm/jobs"
    body = {"metadata": {"name": "j"}, "spec": {"template": {"spec": {"containers": []}}}}
    api.answers = {jobs: (201, json.dumps(body)), f"{jobs}/j": (200, "{}")}
    cluster = Cluster("llm")
    assert cluster.create("Job", body) == body
    assert json.loads(api.asked[-1][2]) == body
    cluster.delete("Job", "j")
    assert api.asked[-1][0] == "DELETE"
    assert "Background" in api.asked[-1][2]
    cluster.delete("Job", "gone")


@pytest.mark.parametrize(
    ("status", "kind", "words"),
    [
        (403, ForbiddenError, "this user may not list Pod; have a Role bound"),
        (401, FailedError, "the cluster does not know this user; log in anew"),
        (500, FailedError, "cannot list Pod (HTTP status 500"),
    ],
)
def test_refusals_are_one_line(api: type[Api], status: int, kind: type[FailedError], words: str) -> None:
    api.answers = {PODS: (status, '{"message": "because\\nof"}')}
    with pytest.raises(kind) as found:
        Cluster("llm").listed("Pod")
    assert words in str(found.value)
    assert "\n" not in str(found.value)


def test_an_api_server_that_is_gone_is_one_line(
    api: type[Api], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "kubeconfig"
    configured = yaml.safe_load(path.read_text())
    configured["clusters"][0]["cluster"]["server"] = "http://127.0.0.1:1"
    path.write_text(yaml.safe_dump(configured))
    with pytest.raises(FailedError, match="no answer from the cluster's API server"):
        Cluster("llm").listed("Pod")


def test_a_broken_configuration_is_one_line(api: type[Api], tmp_path: Path) -> None:
    (tmp_path / "kubeconfig").write_text("a: [")
    with pytest.raises(UsageError) as found:
        Cluster("llm")
    assert "\n" not in str(found.value)


def test_a_command_that_cannot_be_run_is_one_line(api: type[Api]) -> None:
    with pytest.raises(FailedError) as found:
        Cluster("llm").execute("p", "engine", ["vqserve", "drain", "--port", "8001"], 5)
    assert "\n" not in str(found.value)
    path = f"{PODS}/p/exec"
    query = "command=vqserve&command=drain&command=--port&command=8001&container=engine"
    assert api.asked[-1][:2] == ("GET", path)
    assert api.asked[-1][2].startswith(query)
