"""A checkpoint that is fetched into a volume, by a Job whose pod is deleted half-way, and then served."""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from kube.cluster import (
    CLASS,
    FOLDER,
    HOST,
    RELEASE,
    Namespace,
    ask,
    call,
    is_served,
    node,
    question,
    values,
    volume_for,
    wait,
)
from kube.cluster import content as said

pytestmark = [pytest.mark.kube, pytest.mark.timeout(1200)]

STAGE = f"app.kubernetes.io/instance={RELEASE},app.kubernetes.io/component=stage"


@dataclass
class Store:
    """A server of files that sends half of the largest one and then waits.

    Attributes:
        url: What pods ask.
        half: Set once it waits.
        go_on: What it waits for.
        ranges: The ranges that were asked for.
    """

    url: str = ""
    half: threading.Event = field(default_factory=threading.Event)
    go_on: threading.Event = field(default_factory=threading.Event)
    ranges: list[str] = field(default_factory=list)


@contextmanager
def store(folder: Path) -> Iterator[Store]:
    found = Store()
    largest = max((path for path in folder.iterdir()), key=lambda path: path.stat().st_size).name

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            name = self.path.strip("/")
            content = (folder / name).read_bytes()
            start = 0
            if asked := self.headers.get("Range"):
                found.ranges.append(asked)
                start = int(asked.removeprefix("bytes=").split("-")[0])
            self.send_response(206 if start else 200)
            self.send_header("ETag", '"one"')
            self.send_header("Content-Length", str(len(content) - start))
            if start:
                self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
            self.end_headers()
            if name == largest and not found.go_on.is_set():
                self.wfile.write(content[start : len(content) // 2])
                self.wfile.flush()
                found.half.set()
                found.go_on.wait(300)
                return
            self.wfile.write(content[start:])

        def log_message(self, *_: object) -> None:
            pass

    addresses = json.loads(call("kubectl", "get", "node", node(), "-o", "json"))["status"]["addresses"]
    internal = next(each["address"] for each in addresses if each["type"] == "InternalIP")
    address = os.environ.get("VQSERVE_NODE_ADDRESS", internal)
    server = ThreadingHTTPServer((address, 0), Handler)
    found.url = f"http://{address}:{server.server_port}/"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield found
    finally:
        found.go_on.set()
        server.shutdown()
        thread.join()
        server.server_close()


def storage_class() -> str:
    """The cluster's default."""
    mark = "storageclass.kubernetes.io/is-default-class"
    classes = json.loads(call("kubectl", "get", "storageclass", "-o", "json"))["items"]
    [found] = [each["metadata"] for each in classes if each["metadata"].get("annotations", {}).get(mark) == "true"]
    return str(found["name"])


def stage_pods(namespace: Namespace) -> list[str]:
    found = namespace.get("pods", "-l", STAGE)["items"]
    return [pod["metadata"]["name"] for pod in found if "deletionTimestamp" not in pod["metadata"]]


def test_a_download_goes_on_where_its_pod_was_deleted_and_is_served(namespace: Namespace) -> None:
    folder = Path("/var/tmp") / f"{namespace.name}-model"
    folder.mkdir()
    folder.chmod(0o777)
    claim = f"{RELEASE}-vqserve-model"
    try:
        volume_for(namespace, claim, str(folder), "ReadWriteOnce", storage_class())
        with store(Path(FOLDER)) as source:
            model = {"source": "download", "pvc": {}, "download": {"url": source.url, "volume": {"size": "1Gi"}}}
            namespace.install(values(model=model, ingress={"enabled": True, "className": CLASS, "hosts": [HOST]}))
            assert source.half.wait(200), namespace.kubectl("describe", "pods")
            [first] = stage_pods(namespace)
            waiting = namespace.pod()["metadata"]["name"]
            wait(
                "the engine says that it waits",
                lambda: "waiting for" in namespace.kubectl("logs", waiting, "-c", "wait-for-checkpoint", check=False),
                60,
            )
            namespace.kubectl("delete", "pod", first, "--wait=false")
            wait("another pod goes on", lambda: stage_pods(namespace) not in ([], [first]), 60)
            source.go_on.set()
            namespace.wait_ready()
            starts = [int(asked.removeprefix("bytes=").split("-")[0]) for asked in source.ranges]
            assert max(starts) > 0, "it began anew"
        assert not list(folder.rglob("*.part"))
        wait("the front door leads to it", lambda: is_served(HOST), 60)
        assert "46" in said(ask(HOST, "/v1/chat/completions", question())[1])
        namespace.helm("uninstall", RELEASE, "--wait")
        assert [item["metadata"]["name"] for item in namespace.get("pvc")["items"]] == [claim]
    finally:
        shutil.rmtree(folder)
