"""Where commands may write their results."""

from __future__ import annotations

import re
import shutil
import stat
from pathlib import Path

import pytest

from vqserve.cli import main
from vqserve.format.errors import UsageError
from vqserve.tables import check_targets


def refused(path: Path, *inputs: Path) -> str:
    with pytest.raises(UsageError, match=rf"--json {re.escape(str(path))}: .*; ") as refusal:
        check_targets({"--json": path}, inputs)
    return str(refusal.value)


def test_a_new_file_and_an_old_result_may_be_written(tmp_path: Path) -> None:
    (tmp_path / "old.json").touch()
    check_targets({"--json": tmp_path / "old.json", "--plot": tmp_path / "new.png", "--x": None}, [None])


def test_what_is_no_regular_file_stays_what_it_is(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    assert "is a link" in refused(tmp_path / "link")
    assert "is a folder" in refused(tmp_path)
    assert "is no regular file" in refused(Path("/dev/full"))
    assert stat.S_ISCHR(Path("/dev/full").stat().st_mode)
    assert "there is no folder" in refused(tmp_path / "nowhere" / "x.json")


def test_what_is_read_is_not_written_over(tmp_path: Path) -> None:
    config = tmp_path / "config.json"
    config.touch()
    (tmp_path / "same.json").hardlink_to(config)
    assert "is what the command reads" in refused(config, config)
    assert "is what the command reads" in refused(tmp_path / "same.json", config)
    assert "would be a surplus file of the checkpoint" in refused(tmp_path / "x.json", tmp_path)


def test_two_results_need_two_files(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    with pytest.raises(UsageError, match=r"--plot .*x\.png: is the file of --json too; name another"):
        check_targets({"--json": tmp_path / "x.png", "--plot": tmp_path / "sub" / ".." / "x.png"}, [])


@pytest.mark.parametrize("place", ["x.json", "sub/x.json"])
def test_no_command_writes_into_a_checkpoint(
    place: str, random_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(random_checkpoint, tmp_path / "checkpoint")
    (folder / "sub").mkdir()
    config, path = str(shutil.copy(folder / "config.json", tmp_path)), str(folder)
    for argv in (
        ("verify", path),
        ("inspect", path),
        ("inspect", config),
        ("plan", path, "--memory", "1GiB"),
        ("plan", config, "--memory", "1GiB"),
        ("eval", "recall", "http://127.0.0.1:9"),
        ("eval", "kl", config, config),
    ):
        assert main([*argv, "--json", str(folder / place)]) == 2
        assert "would be a surplus file of the checkpoint; write it somewhere else" in capsys.readouterr().err
