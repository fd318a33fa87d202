"""The demo, served as a user serves it: `vqserve serve plugin/demo/model`."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from openai import OpenAI

KEY = "e2e-secret"
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
def server(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The demo model's server on a free port; the machine's proxy and cache settings do not reach it."""
    folder = tmp_path_factory.mktemp("server")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [str(Path(sys.executable).with_name("vqserve")), "serve", str(demo_model), "--port", str(port)]
    environment = {name: os.environ[name] for name in ("PATH", "LANG") if name in os.environ}
    environment |= {"HOME": str(folder), "VLLM_API_KEY": KEY}
    url, log = f"http://127.0.0.1:{port}", folder / "log"
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment)
    try:
        _wait_until_healthy(process, url, log)
        yield Server(process, log, url, OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0, timeout=120))
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            raise


def _wait_until_healthy(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        assert process.poll() is None, f"the server ended with {process.returncode}:\n{log.read_text()[-4000:]}"
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=5):
                return
        except OSError:
            time.sleep(0.5)
    raise TimeoutError(f"not healthy within {START_SECONDS} s:\n{log.read_text()[-4000:]}")
