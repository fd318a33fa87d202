"""A Prometheus on a port of its own, which scrapes one server as it would in a cluster and is asked over HTTP."""

from __future__ import annotations

import json
import shutil
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loadtest.ports import free_port

NAMESPACE, RELEASE = "llm", "demo-vqserve"
POD = f"{RELEASE}-5d8f7c9b6d-x2x4z"
LABELS = {"namespace": NAMESPACE, "service": RELEASE, "pod": POD, "container": "engine", "job": RELEASE}
"""What a target has that the chart's ServiceMonitor found, beside `endpoint` and `instance`."""
SCRAPE_SECONDS = 1
DEADLINE_SECONDS = 30

# As the Prometheus operator writes for a ServiceMonitor: pkg/prometheus/promcfg.go, generateServiceMonitorConfig.
_RELABELLED = {
    "namespace": "__meta_kubernetes_namespace",
    "service": "__meta_kubernetes_service_name",
    "pod": "__meta_kubernetes_pod_name",
    "container": "__meta_kubernetes_pod_container_name",
    "job": "__meta_kubernetes_service_name",
}
Sample = dict[str, Any]
"""`metric`, its labels, and `value` or `values`, as the API has them."""


@dataclass(frozen=True)
class Prometheus:
    """A running Prometheus.

    Attributes:
        url: Its address.
        process: It.
        log: File with everything it printed.
    """

    url: str
    process: subprocess.Popen[bytes]
    log: Path

    def answer(self, path: str, **parameters: str | float) -> Any:
        """What is under `data` in an answer of `/api/v1/PATH`.

        Raises:
            ValueError: It answered with an error, which is the message.
        """
        query = urllib.parse.urlencode(parameters)
        try:
            with urllib.request.urlopen(f"{self.url}/api/v1/{path}?{query}", timeout=DEADLINE_SECONDS) as response:
                return json.load(response)["data"]
        except urllib.error.HTTPError as error:
            with error:
                raise ValueError(error.read().decode()) from error

    def samples(self, expr: str, at: float) -> list[Sample]:
        """A query's series at a time, in seconds since the epoch."""
        found: list[Sample] = self.answer("query", query=expr, time=at)["result"]
        return found

    def over(self, expr: str, start: float, end: float, step: float) -> list[Sample]:
        """A query's series between two times, a value every `step` seconds."""
        found: list[Sample] = self.answer("query_range", query=expr, start=start, end=end, step=step)["result"]
        return found

    def is_ready(self) -> bool:
        """Whether it answers queries."""
        try:
            with urllib.request.urlopen(f"{self.url}/-/ready", timeout=DEADLINE_SECONDS):
                return True
        except OSError:  # nothing listens yet, or it says 503
            return False

    def wait_until(self, holds: Callable[[], bool], seconds: float = DEADLINE_SECONDS) -> None:
        """Waits until something holds of it."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            assert self.process.poll() is None, self.log.read_text()[-4000:]
            if holds():
                return
            time.sleep(0.05)
        raise TimeoutError(f"not within {seconds} s:\n{self.log.read_text()[-4000:]}")


@contextmanager
def watching(server: str, rules: Path, folder: Path) -> Iterator[Prometheus]:
    """Starts a Prometheus, and ends it.

    Args:
        server: Address of the server that it scrapes, as `http://host:port`.
        rules: A rule file.
        folder: Empty; for what it writes.
    """
    program = shutil.which("prometheus")
    assert program, "no prometheus: Debian has it in the package of that name"
    config, log = folder / "prometheus.yaml", folder / "log"
    config.write_text(json.dumps(_config(server, rules)), "utf-8")
    address = f"127.0.0.1:{free_port()}"
    command = [program, f"--config.file={config}", f"--storage.tsdb.path={folder / 'data'}"]
    with log.open("wb") as output:
        process = subprocess.Popen([*command, f"--web.listen-address={address}"], stdout=output, stderr=output)
    try:
        started = Prometheus(f"http://{address}", process, log)
        started.wait_until(started.is_ready)
        yield started
    finally:
        process.terminate()
        try:
            process.wait(DEADLINE_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            raise


def _config(server: str, rules: Path) -> dict[str, Any]:
    """YAML, JSON being that."""
    meta = {source: LABELS[label] for label, source in _RELABELLED.items()}
    return {
        "global": {
            "scrape_interval": f"{SCRAPE_SECONDS}s",
            "scrape_timeout": f"{SCRAPE_SECONDS}s",
            "evaluation_interval": f"{SCRAPE_SECONDS}s",
        },
        "rule_files": [str(rules)],
        "scrape_configs": [
            {
                "job_name": "serviceMonitor",
                "static_configs": [{"targets": [server.removeprefix("http://")], "labels": meta}],
                "relabel_configs": [
                    *({"source_labels": [source], "target_label": label} for label, source in _RELABELLED.items()),
                    {"target_label": "endpoint", "replacement": "http"},
                ],
            }
        ],
    }
