"""`vqserve preflight` on a machine without GPUs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from vqserve.cli import main
from vqserve.preflight.command import settings_of, summarized, write_message
from vqserve.preflight.findings import Finding, Verdict

Capture = pytest.CaptureFixture[str]


def test_a_good_machine_is_said_to_be_one(random_checkpoint: Path, tmp_path: Path, capsys: Capture) -> None:
    report = tmp_path / "report.json"
    assert main(["preflight", str(random_checkpoint), "--tensor-parallel-size", "2", "--json", str(report)]) == 0
    out = capsys.readouterr().out
    assert "all-reduce" in out
    assert "preflight: 0 failed" in out
    found = {finding["what"]: finding for finding in json.loads(report.read_text())}
    assert found["checkpoint"]["verdict"] == found["memory"]["verdict"] == found["all-reduce"]["verdict"] == "ok"


def test_what_serve_would_refuse_fails_and_is_the_last_word(
    random_checkpoint: Path, tmp_path: Path, capsys: Capture
) -> None:
    message = tmp_path / "termination-log"
    message.touch()
    argv = ["preflight", str(random_checkpoint), "--max-model-len", "999999999", "--message", str(message)]
    assert main(argv) == 1
    assert "FAIL     to be served" in capsys.readouterr().out
    said = message.read_text()
    assert said.startswith("preflight: 1 failed")
    assert "FAIL: to be served: --max-model-len 999999999" in said
    assert main([*argv, "--mode", "warn"]) == 0


def test_a_damaged_checkpoint_is_named_with_its_file(random_checkpoint: Path, tmp_path: Path, capsys: Capture) -> None:
    folder = shutil.copytree(random_checkpoint, tmp_path / "model")
    (folder / "manifest.json").write_text("{")
    assert main(["preflight", str(folder)]) == 1
    assert "manifest.json" in capsys.readouterr().out


def test_without_a_checkpoint_the_machine_alone_is_judged(capsys: Capture) -> None:
    assert main(["preflight"]) == 0
    assert "unknown  checkpoint" in capsys.readouterr().out


def test_what_it_cannot_use_or_write_to_is_refused_before_anything_is_looked_at(
    tmp_path: Path, capsys: Capture
) -> None:
    for place in (tmp_path, tmp_path / "no" / "message"):
        assert main(["preflight", "--mode", "warn", "--message", str(place)]) == 2
        assert f"--message {place}: is a folder, or in none" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["preflight", "--product", "["])
    assert "'[' is no regular expression" in capsys.readouterr().err


def test_settings_are_written_as_a_shell_takes_them() -> None:
    finding = Finding("all-reduce", Verdict.FAIL, "hung", "", {"NCCL_P2P_DISABLE": "1"}, ("--disable-x",))
    assert settings_of([finding, finding]) == "NCCL_P2P_DISABLE=1 vqserve serve ... -- --disable-x"
    assert settings_of([]) == ""
    assert summarized([finding]).endswith("settings: NCCL_P2P_DISABLE=1 vqserve serve ... -- --disable-x")


def test_a_message_is_cut_to_what_kubernetes_keeps(tmp_path: Path) -> None:
    for path in (tmp_path / "new", tmp_path / "there"):
        (tmp_path / "there").touch()
        write_message(path, "é" * 4000)
        assert path.read_text(encoding="utf-8") == "é" * 2048
