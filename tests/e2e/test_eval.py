from __future__ import annotations

import json
from pathlib import Path

import pytest

from e2e.conftest import KEY, Server
from vqserve.cli import main

pytestmark = pytest.mark.e2e


@pytest.mark.parametrize("task", ["arithmetic", "recall"])
def test_a_served_model_is_measured_and_compared_with_itself(
    task: str, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("VLLM_API_KEY", KEY)
    first, options = tmp_path / "first.json", ["--per-language", "8", "--gaps"]
    assert main(["eval", task, server.url, *options, "--json", str(first)]) == 0
    report = json.loads(first.read_text())
    assert len(report["items"]) == 2 * 3 * 8
    overall = next(row for row in report["scores"] if row["group"] == "all" and row["mode"] == "thinking")
    assert overall["ended"] == 1.0
    assert overall["right"] > 0.5
    assert all(bool(item["reasoning"]) == (item["mode"] == "thinking") for item in report["items"])
    for item in report["items"]:
        said = "".join(token for token, _ in item["tokens"])
        assert item["content"] in said
        assert item["reasoning"] in said
        assert all(gap >= 0 for _, gap in item["tokens"])
    capsys.readouterr()
    assert main(["eval", task, server.url, *options, "--against", str(first)]) == 0
    out = capsys.readouterr().out
    assert "p = 1" in out
    assert "of 48 answers the same" in out
    assert "part from the earlier one in some token" in out


def test_a_wrong_key_is_said_so(
    server: Server, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("VLLM_API_KEY", "wrong")
    assert main(["eval", "recall", server.url]) == 2
    assert "VLLM_API_KEY" in capsys.readouterr().err
