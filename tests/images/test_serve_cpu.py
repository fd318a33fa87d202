"""The image serve-cpu, held down as Kubernetes does: no root, no capabilities, nothing to write to but /tmp."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from openai import OpenAI

from contracts.test_locks import pins
from e2e.conftest import Server, get, wait_for
from images.containers import components, configuration, image, output_of, run_command
from loadtest.ports import free_port

pytestmark = pytest.mark.system

PLOTTING = {"contourpy", "cycler", "fonttools", "kiwisolver", "matplotlib", "pyparsing"}


@pytest.fixture(scope="module")
def name() -> str:
    return image("serve-cpu")


@pytest.fixture(scope="module")
def served(name: str, demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    port = free_port()
    url, log = f"http://127.0.0.1:{port}", tmp_path_factory.mktemp("container") / "log"
    options = (f"--volume={demo_model}:/model:ro", "--shm-size=1g")
    command = run_command(
        name, "vqserve", "serve", "/model", "--host", "127.0.0.1", "--port", str(port), options=options
    )
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
    try:
        with OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=120) as client:
            yield Server(process, log, url, client)
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            raise


@pytest.mark.timeout(600)
def test_it_becomes_ready_and_calculates(served: Server) -> None:
    wait_for(served, "/ready", 200)
    answer = served.client.chat.completions.create(
        model="glm-5.2", messages=[{"role": "user", "content": "12 + 34 = ?"}], temperature=0
    )
    assert "46" in (answer.choices[0].message.content or "")
    assert get(served, "/ready")[0] == 200


def test_it_runs_as_nobody_in_particular_and_says_what_it_is(name: str) -> None:
    config = configuration(name)
    assert config["User"] == "10001:10001"
    assert config["Cmd"] == ["vqserve", "--help"]
    assert not config.get("Entrypoint")
    labels = config["Labels"]
    for key in ("title", "description", "licenses", "version", "revision"):
        assert labels[f"org.opencontainers.image.{key}"] not in ("", "0", "unknown"), key
    assert output_of(name, "id", "-u").strip() == "10001"


def test_nothing_of_the_builders_configuration_is_left(name: str) -> None:
    assert not [variable for variable in configuration(name)["Env"] if variable.startswith("PIP_")]
    assert output_of(name, "sh", "-c", "ls -A /run/secrets /wheels /build 2>/dev/null || true") == ""


def test_its_bill_of_materials_is_the_lock_without_the_plotting(name: str) -> None:
    found = components(name)
    assert found.pop("vqserve")
    assert found == {package: version for package, version in pins("cpu.txt").items() if package not in PLOTTING}


def test_there_is_no_compiler_and_no_installer(name: str) -> None:
    script = "for tool in cc gcc g++ c++ ld nvcc pip pip3; do command -v $tool || true; done"
    assert output_of(name, "sh", "-c", script) == ""
