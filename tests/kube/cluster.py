"""What the tests do to a cluster: `kubectl` and `helm`, waiting, and asking through its front doors."""

from __future__ import annotations

import base64
import json
import os
import secrets
import shlex
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

BIN = Path(sys.executable).parent
CHART = Path(__file__).parents[2] / "charts" / "vqserve"
IMAGES = os.environ.get("IMAGES", "localhost/vqserve")
TAG = os.environ.get("IMAGE_TAG", "dev")
"""The images `serve-cpu`, `ops`, `loadtest` and `demo-model`, which the nodes have."""
FOLDER = os.environ.get("VQSERVE_NODE_FOLDER", str(CHART.parents[1] / "plugin" / "demo" / "model"))
"""Folder of the demo checkpoint on the node, readable by every user."""
HELM = shlex.split(os.environ.get("HELM", "helm"))
FRONT = os.environ.get("VQSERVE_FRONT", "http://127.0.0.1")
"""Where the ingress controller and the gateway listen, as the tests reach them."""
CLASS = os.environ.get("VQSERVE_INGRESS_CLASS", "traefik")
"""Name of ingress class and gateway class."""

SHARED_CORES = [
    {"name": "VLLM_CPU_OMP_THREADS_BIND", "value": "nobind"},
    {"name": "OMP_NUM_THREADS", "value": "1"},
]
"""vLLM binds itself to cores, every pod to the same: on two cores a worker that was to end got no time on its one."""

STALL = 15
"""Seconds without a step until the served engine counts as stuck."""

RELEASE = "vq"
ENGINE = f"app.kubernetes.io/instance={RELEASE},app.kubernetes.io/component=engine"
KEY = "correct-horse"
KEY_SECRET = "vqserve-key"
HOST = "llm.test"
ROUTED = "gateway.llm.test"


def call(*command: str, stdin: str | None = None, check: bool = True, timeout: float = 600) -> str:
    """Runs a command; its output, or an error that holds everything it said."""
    done = subprocess.run(command, input=stdin, capture_output=True, text=True, timeout=timeout)
    if check and done.returncode:
        raise AssertionError(f"{shlex.join(command)} ended with {done.returncode}\n{done.stdout}\n{done.stderr}")
    return done.stdout if check else done.stdout + done.stderr


def wait(what: str, ready: Callable[[], Any], seconds: float) -> Any:
    """Asks again and again until the answer is true; that answer."""
    end = time.monotonic() + seconds
    while True:
        if found := ready():
            return found
        if time.monotonic() > end:
            raise AssertionError(f"not within {seconds:g} s: {what}")
        time.sleep(0.5)


@dataclass(frozen=True)
class Namespace:
    """A namespace of its own that enforces PodSecurity `restricted`."""

    name: str

    def kubectl(self, *arguments: str, stdin: str | None = None, check: bool = True) -> str:
        return call("kubectl", "-n", self.name, *arguments, stdin=stdin, check=check)

    def get(self, *arguments: str) -> Any:
        return json.loads(self.kubectl("get", *arguments, "-o", "json"))

    def apply(self, *objects: Mapping[str, Any]) -> None:
        self.kubectl("apply", "-f", "-", stdin=json.dumps({"apiVersion": "v1", "kind": "List", "items": objects}))

    def helm(self, *arguments: str, values: Mapping[str, Any] | None = None, check: bool = True) -> str:
        given = ["--values", "-"] if values is not None else []
        stdin = json.dumps(values) if values is not None else None
        return call(*HELM, "-n", self.name, *arguments, *given, stdin=stdin, check=check)

    def install(self, values: Mapping[str, Any], *options: str) -> None:
        self.helm("upgrade", "--install", RELEASE, str(CHART), *options, values=values)

    def pods(self) -> list[Any]:
        """The engine's pods that are not on their way out."""
        found = self.get("pods", "-l", ENGINE)["items"]
        return [pod for pod in found if "deletionTimestamp" not in pod["metadata"]]

    def pod(self) -> Any:
        [pod] = self.pods()
        return pod

    def is_ready(self) -> bool:
        """Whether all replicas are of the newest template, and ready."""
        deployment = self.get("deployment", "-l", ENGINE)["items"][0]
        status, wanted = deployment.get("status", {}), deployment["spec"]["replicas"]
        return bool(
            status.get("observedGeneration") == deployment["metadata"]["generation"]
            and status.get("updatedReplicas") == status.get("replicas") == status.get("availableReplicas") == wanted
        )

    def wait_ready(self, seconds: float = 400) -> None:
        try:
            wait("the engine is ready", self.is_ready, seconds)
        except AssertionError as error:
            said = self.kubectl("describe", "pods", "-l", ENGINE, check=False)
            logs = self.kubectl("logs", "-l", ENGINE, "--all-containers", "--tail=40", check=False)
            raise AssertionError(f"{error}\n{said[-6000:]}\n{logs[-6000:]}") from None

    def ops(self, task: str, *arguments: str) -> tuple[int, str]:
        """Exit code and words of `vqserve-ops`, asked about the release."""
        command = [str(BIN / "vqserve-ops"), task, RELEASE, "-n", self.name, *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        return done.returncode, done.stdout + done.stderr

    def rollout(self, seconds: int = 20) -> tuple[int, str]:
        """Exit code and words of `vqserve-ops rollout`."""
        return self.ops("rollout", "--timeout", str(seconds))

    def last_words(self, container: str = "engine") -> str:
        """Termination message of a container's last run, or what it waits for; empty if neither."""
        for pod in self.pods():
            status = pod.get("status", {})
            for found in (*status.get("containerStatuses", ()), *status.get("initContainerStatuses", ())):
                if found["name"] == container:
                    for state in (found.get("state", {}), found.get("lastState", {})):
                        if message := state.get("terminated", {}).get("message"):
                            return str(message)
        return ""


@contextmanager
def new_namespace(level: str = "restricted") -> Iterator[Namespace]:
    """A namespace with the API key's Secret, gone afterwards with all that is in it."""
    name = f"vqserve-{secrets.token_hex(3)}"
    labels = {f"pod-security.kubernetes.io/{mode}": level for mode in ("enforce", "warn")}
    call(
        "kubectl",
        "create",
        "-f",
        "-",
        stdin=json.dumps({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": labels}}),
    )
    namespace = Namespace(name)
    try:
        secret = {"api-key": base64.b64encode(KEY.encode()).decode()}
        namespace.apply({"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "vqserve-key"}, "data": secret})
        yield namespace
    finally:
        call("kubectl", "delete", "namespace", name, "--wait=false")
        call("kubectl", "delete", "pv", "-l", f"for={name}", "--wait=false", check=False)


def node() -> str:
    """A node that runs containers."""
    nodes = json.loads(call("kubectl", "get", "nodes", "-o", "json"))["items"]
    real = [each["metadata"] for each in nodes if "kwok.x-k8s.io/node" not in each["metadata"].get("annotations", {})]
    return str(real[0]["name"])


def volume_for(namespace: Namespace, claim: str, folder: str, mode: str, storage_class: str = "") -> None:
    """A local volume that waits for a claim: a folder of the node's."""
    key = {"key": "kubernetes.io/hostname", "operator": "In", "values": [node()]}
    volume = {
        "apiVersion": "v1",
        "kind": "PersistentVolume",
        "metadata": {"name": f"{namespace.name}-{claim}", "labels": {"for": namespace.name}},
        "spec": {
            "capacity": {"storage": "1Gi"},
            "accessModes": [mode],
            "persistentVolumeReclaimPolicy": "Retain",
            "storageClassName": storage_class,
            "claimRef": {"namespace": namespace.name, "name": claim},
            "local": {"path": folder},
            "nodeAffinity": {"required": {"nodeSelectorTerms": [{"matchExpressions": [key]}]}},
        },
    }
    namespace.apply(volume)


def claim_on(namespace: Namespace, name: str, folder: str = FOLDER, mode: str = "ReadOnlyMany") -> None:
    """A claim of a local volume: a folder of the node's."""
    volume_for(namespace, name, folder, mode)
    claim = {
        "apiVersion": "v1",
        "kind": "PersistentVolumeClaim",
        "metadata": {"name": name},
        "spec": {
            "accessModes": [mode],
            "storageClassName": "",
            "volumeName": f"{namespace.name}-{name}",
            "resources": {"requests": {"storage": "1Gi"}},
        },
    }
    namespace.apply(claim)


def values(**more: Any) -> dict[str, Any]:
    """The demo on CPUs, `more` laid over it a level deep."""
    chosen: dict[str, Any] = {
        "image": {"repository": f"{IMAGES}/serve-cpu", "tag": TAG},
        "opsImage": {"repository": f"{IMAGES}/ops", "tag": TAG},
        "engine": {"device": "cpu", "gpus": 0, "env": SHARED_CORES},
        "model": {"source": "pvc", "pvc": {"claimName": "demo-model"}},
        "preflight": {"mode": "refuse"},
        "resources": {"requests": {"cpu": "500m", "memory": "3Gi"}, "limits": {"memory": "6Gi"}},
        "shm": {"size": "1Gi"},
        "podSecurity": {"readOnlyRootFilesystem": True},
        "scheduling": {"nodeSelector": {"kubernetes.io/hostname": node()}},
        "auth": {"existingSecret": KEY_SECRET},
        "drain": {"waitSeconds": 5, "seconds": 60},
    }
    for name, value in more.items():
        both = isinstance(value, dict) and isinstance(chosen.get(name), dict)
        chosen[name] = {**chosen[name], **value} if both else value
    return chosen


def request(host: str, path: str, body: Any = None, key: str | None = KEY) -> urllib.request.Request:
    headers = {"Host": host, "Content-Type": "application/json"}
    if key:
        headers["Authorization"] = f"Bearer {key}"
    data = json.dumps(body).encode() if body is not None else None
    return urllib.request.Request(f"{FRONT}{path}", data, headers)


def ask(host: str, path: str, body: Any = None, key: str | None = KEY) -> tuple[int, str]:
    """Status and body of an answer through a front door."""
    try:
        with urllib.request.urlopen(request(host, path, body, key), timeout=120) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode(errors="replace")


def is_served(host: str) -> bool:
    """Whether a front door leads to the engine."""
    return ask(host, "/v1/models")[0] == 200


def question(text: str = "12 + 34 = ?", **more: Any) -> dict[str, Any]:
    return {"model": "glm-5.2", "messages": [{"role": "user", "content": text}], "temperature": 0, **more}


def content(body: str) -> str:
    return str(json.loads(body)["choices"][0]["message"]["content"])


@dataclass(frozen=True)
class Stream:
    """A streamed answer.

    Attributes:
        times: When each event came, in seconds from the request.
        text: Reasoning and answer together.
        done: Whether it ended as the API says a stream ends.
    """

    times: Sequence[float]
    text: str
    done: bool


def stream(host: str, tokens: int = 200) -> Stream:
    """A streamed answer of that many tokens."""
    begin, times, text, done = time.monotonic(), [], "", False
    body = question(stream=True, max_tokens=tokens, ignore_eos=True)
    with urllib.request.urlopen(request(host, "/v1/chat/completions", body), timeout=300) as lines:
        for line in lines:
            if not line.startswith(b"data: "):
                continue
            times.append(time.monotonic() - begin)
            if line.strip() == b"data: [DONE]":
                done = True
                continue
            for choice in json.loads(line[6:])["choices"]:
                delta = choice["delta"]
                text += (delta.get("reasoning") or "") + (delta.get("content") or "")
    return Stream(times, text, done)
