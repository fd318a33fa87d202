"""The one module that talks to Kubernetes: objects come as the API has them in JSON, errors as one line."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import urllib3
import yaml
from kubernetes import client, config, stream
from kubernetes.config.config_exception import ConfigException

from vqserve.format.errors import UsageError
from vqserve_ops.errors import FailedError
from vqserve_ops.objects import Object

_SECONDS = 30
_MOUNTED_NAMESPACE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")
_KINDS = {
    "ConfigMap": ("CoreV1Api", "config_map"),
    "Deployment": ("AppsV1Api", "deployment"),
    "Event": ("CoreV1Api", "event"),
    "Job": ("BatchV1Api", "job"),
    "PersistentVolumeClaim": ("CoreV1Api", "persistent_volume_claim"),
    "Pod": ("CoreV1Api", "pod"),
    "ReplicaSet": ("AppsV1Api", "replica_set"),
    "Secret": ("CoreV1Api", "secret"),
    "Service": ("CoreV1Api", "service"),
}


class ForbiddenError(FailedError):
    """The cluster does not let this user do it."""


class AbsentError(FailedError):
    """There is no such object, or nothing of it yet."""


class Cluster:
    """A namespace of the cluster that KUBECONFIG, or the pod this runs in, stands for.

    Args:
        namespace: Its name; None for the one that the configuration has.

    Raises:
        UsageError: There is no such configuration.
    """

    def __init__(self, namespace: str | None) -> None:
        settings = client.Configuration()
        place = os.environ.get("KUBECONFIG") or str(Path.home() / ".kube" / "config")
        try:
            if _in_a_pod() and not os.environ.get("KUBECONFIG"):
                config.load_incluster_config(client_configuration=settings)  # type: ignore[no-untyped-call]
                own = _MOUNTED_NAMESPACE.read_text("utf-8").strip()
            else:
                config.load_kube_config(  # type: ignore[no-untyped-call]
                    config_file=place, client_configuration=settings
                )
                _, active = config.list_kube_config_contexts(config_file=place)  # type: ignore[no-untyped-call]
                own = str(active["context"].get("namespace") or "default")
        except (ConfigException, OSError, yaml.YAMLError, KeyError, TypeError) as error:
            problem = f"no cluster is configured ({' '.join(str(error).split())})"
            raise UsageError(f"{problem}; set KUBECONFIG, or run it in a pod with a service account") from error
        self.namespace = namespace or own
        self._api = client.ApiClient(settings)

    def listed(self, kind: str, labels: Mapping[str, str] | None = None) -> list[Object]:
        """All objects of a kind, or those with these labels."""
        selector = ",".join(f"{name}={value}" for name, value in (labels or {}).items())
        found = self._asked("list", kind, label_selector=selector)
        items: list[Object] = found.get("items") or []
        return items

    def get(self, kind: str, name: str) -> Object | None:
        """An object, or None if there is none of that name."""
        try:
            return self._asked("read", kind, name=name)
        except AbsentError:
            return None

    def create(self, kind: str, body: Object) -> Object:
        """Makes an object."""
        return self._asked("create", kind, body=body)

    def delete(self, kind: str, name: str) -> None:
        """Removes an object and what it owns."""
        try:
            self._asked("delete", kind, name=name, propagation_policy="Background")
        except AbsentError:
            return

    def nodes(self) -> list[Object]:
        """All nodes; none if this user may not look at them."""
        try:
            with self._speaking("list nodes"):
                found = _read(client.CoreV1Api(self._api).list_node(_preload_content=False, _request_timeout=_SECONDS))
        except ForbiddenError:
            return []
        items: list[Object] = json.loads(found).get("items") or []
        return items

    def version(self) -> str:
        """Of the API server."""
        with self._speaking("read its version"):
            return str(client.VersionApi(self._api).get_code(_request_timeout=_SECONDS).git_version)

    def log(self, pod: str, container: str, *, previous: bool = False, lines: int = 200) -> str:
        """The last lines of a container's log; empty if there is none."""
        try:
            with self._speaking(f"read the log of pod {pod}"):
                answer = client.CoreV1Api(self._api).read_namespaced_pod_log(
                    pod, self.namespace, container=container, previous=previous, tail_lines=lines,
                    _preload_content=False, _request_timeout=_SECONDS,
                )  # fmt: skip
                return _read(answer).decode("utf-8", "replace")
        except (AbsentError, ForbiddenError):
            return ""

    def execute(self, pod: str, container: str, command: Sequence[str], seconds: float) -> tuple[int, str]:
        """Runs a command in a container.

        Returns:
            Its exit code and what it printed.

        Raises:
            FailedError: It has not ended in time.
        """
        with self._speaking(f"run `{command[0]}` in pod {pod}"):
            answer = stream.stream(
                client.CoreV1Api(self._api).connect_get_namespaced_pod_exec, pod, self.namespace, container=container,
                command=list(command), stdout=True, stderr=True, stdin=False, tty=False, _preload_content=False,
            )  # fmt: skip
            try:
                answer.run_forever(timeout=seconds)
                if answer.is_open():
                    raise FailedError(f"pod {pod}: `{' '.join(command)}` has not ended in {seconds:.0f} s; see its log")
                try:
                    code = int(answer.returncode)  # before `read_all`, which throws the channel of the status away
                    return code, str(answer.read_all())
                except (ValueError, KeyError, TypeError) as error:
                    problem = f"`{command[0]}` could not be run in container {container}"
                    raise FailedError(f"pod {pod}: {problem}; look at the container's image") from error
            finally:
                answer.close()

    def _asked(self, verb: str, kind: str, **arguments: Any) -> dict[str, Any]:
        api, name = _KINDS[kind]
        call: Callable[..., Any] = getattr(getattr(client, api)(self._api), f"{verb}_namespaced_{name}")
        with self._speaking(f"{verb} {kind} {arguments.get('name', '')}".rstrip()):
            answer = call(
                namespace=self.namespace, _preload_content=False, _request_timeout=_SECONDS,
                **{key: value for key, value in arguments.items() if value != ""},
            )  # fmt: skip
            found: dict[str, Any] = json.loads(_read(answer))
            return found

    @contextmanager
    def _speaking(self, what: str) -> Iterator[None]:
        """Turns what the API may answer into an error that a person can act on."""
        where = f"namespace {self.namespace}"
        try:
            yield
        except client.ApiException as error:
            if error.status in (400, 404):
                said = _message(error.body) or str(error.reason)
                raise AbsentError(f"{where}: cannot {what} ({said}); look whether it is still there") from error
            if error.status == 403:
                problem = f"this user may not {what}"
                raise ForbiddenError(f"{where}: {problem}; have a Role bound that allows it") from error
            if error.status == 401:
                raise FailedError(f"{where}: the cluster does not know this user; log in anew") from error
            said = f"HTTP status {error.status} {error.reason}: {_message(error.body)}".rstrip(": ")
            raise FailedError(f"{where}: cannot {what} ({said}); run it again, then look at the API server") from error
        except urllib3.exceptions.HTTPError as error:
            raise FailedError("no answer from the cluster's API server; check KUBECONFIG and the network") from error


def _read(answer: Any) -> bytes:
    status, data = int(answer.status), bytes(answer.data)
    if not 200 <= status <= 299:
        raise client.ApiException(status=status, reason=str(answer.reason), body=data.decode("utf-8", "replace"))
    return data


def _message(body: object) -> str:
    try:
        return str(json.loads(str(body))["message"])
    except (ValueError, KeyError, TypeError):
        return ""


def _in_a_pod() -> bool:
    return "KUBERNETES_SERVICE_HOST" in os.environ
