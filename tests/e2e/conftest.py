"""The demo, served as a user serves it: `vqserve serve plugin/demo/model`."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from openai import OpenAI
from prometheus_client.parser import text_string_to_metric_families

from e2e.receiver import Receiver, receiver
from loadtest.ports import free_port

KEY = "e2e-secret"
Samples = dict[str, dict[str, float]]
STALL = 5
"""Seconds without a step until the engine of `watched` counts as stuck."""
CONTEXT = 2048
"""Of `watched`; a step of the engine takes as many tokens, and so one prompt of more than half of them."""
BUDGET = 24
"""Of thinking, in tokens; the known answers think for longer, and none of this may touch the warm-up."""
START_SECONDS = 240
"""Three processes import vLLM one after the other: 40 s on two idle cores."""


@dataclass(frozen=True)
class Server:
    """A running server.

    Attributes:
        process: What was `vqserve serve` and has become vLLM's server.
        log: File with everything it printed.
        url: Its address, without /v1.
        client: An OpenAI client that knows its key.
    """

    process: subprocess.Popen[bytes]
    log: Path
    url: str
    client: OpenAI


@pytest.fixture(scope="session")
def spans() -> Iterator[Receiver]:
    """What collects the server's traces."""
    with receiver() as started:
        yield started


@pytest.fixture(scope="session")
def server(demo_model: Path, spans: Receiver, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The demo model's server, which sends its traces to `spans`."""
    options, folder = ("--", "--otlp-traces-endpoint", spans.url), tmp_path_factory.mktemp("server")
    with serving(demo_model, folder, *options, OTEL_SERVICE_NAME="demo", OTEL_BSP_SCHEDULE_DELAY="200") as started:
        wait_for(started, "/health", 200)
        yield started


@dataclass(frozen=True)
class Watched:
    """A server that was watched from its first moment on.

    Attributes:
        server: It.
        states: What `/ready` answered until it was ready, that answer last.
    """

    server: Server
    states: list[str]


@pytest.fixture(scope="session")
def watched(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    """The demo's server with both safety nets and little patience: tests of nets, then those of its life and end."""
    nets = ("--anti-repetition", "1", "--thinking-budget", str(BUDGET))
    options = ("--stall-seconds", str(STALL), "--max-model-len", str(CONTEXT), *nets)
    with serving(demo_model, tmp_path_factory.mktemp("watched"), *options) as started:
        yield Watched(started, wait_for(started, "/ready", 200))


@contextmanager
def serving(model: Path, folder: Path, *options: str, **variables: str) -> Iterator[Server]:
    """Starts a model's server on a free port, and ends it; the machine's proxy and cache settings do not reach it."""
    port = free_port()
    command = [str(Path(sys.executable).with_name("vqserve")), "serve", str(model), "--port", str(port), *options]
    environment = {name: os.environ[name] for name in ("PATH", "LANG") if name in os.environ}
    # Threads that spin for their next operation would take the cores from another process's server.
    environment |= {"HOME": str(folder), "VLLM_API_KEY": KEY, "OMP_WAIT_POLICY": "passive"}
    if "--tensor-parallel-size" not in options:
        # vLLM ties an engine to the first core, and would tie another process's to the same.
        environment |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}
    environment |= variables
    url, log = f"http://127.0.0.1:{port}", folder / "log"
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment)
    try:
        with OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0, timeout=120) as client:
            yield Server(process, log, url, client)
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            raise


def get(server: Server, path: str) -> tuple[int, str]:
    """Status and body of a GET without any key; status 0 while nothing listens."""
    try:
        with urllib.request.urlopen(f"{server.url}{path}", timeout=5) as response:
            return response.status, response.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()
    except OSError:
        return 0, ""


def scraped(server: Server) -> Samples:
    """Every sample of `/metrics`, by name and then by its labels' values, without those that all have."""
    status, text = get(server, "/metrics")
    assert status == 200
    found: Samples = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            values = [value for name, value in sorted(sample.labels.items()) if name not in ("model_name", "engine")]
            found.setdefault(sample.name, {})[",".join(values)] = sample.value
    return found


def wait_for(server: Server, path: str, status: int) -> list[str]:
    """Waits until a path answers with this status; the bodies of all answers on the way, that one last."""
    return wait_until(server, path, lambda found, _: found == status)


def wait_until(server: Server, path: str, wanted: Callable[[int, str], bool]) -> list[str]:
    """Waits until a path's status and body are as wanted; the bodies of all answers on the way, that one last."""
    bodies: list[str] = []
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        ended = server.process.poll()
        assert ended is None, f"the server ended with {ended}:\n{server.log.read_text()[-4000:]}"
        found, body = get(server, path)
        if found:
            bodies.append(body)
        if found and wanted(found, body):
            return bodies
        time.sleep(0.05)
    raise TimeoutError(f"{path}: not as wanted within {START_SECONDS} s:\n{server.log.read_text()[-4000:]}")
