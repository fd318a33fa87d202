"""The work folder: whole results or none, one encode at a time, nobody else's files."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from vqserve.encode.work import Work, check_work, open_work
from vqserve.encode.writer import MARKER, claimed
from vqserve.format.errors import UsageError

KEY = {"seed": 0}


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_results_outlive_the_encode_for_the_same_key_only(tmp_path: Path, seed: int) -> None:
    tensor = torch.randn(5, generator=torch.Generator().manual_seed(seed))
    with open_work(tmp_path / "work", KEY) as work:
        work.save("one", {"x": tensor})
    with open_work(tmp_path / "work", KEY) as work:
        assert torch.equal(work.load("one")["x"], tensor)
        assert torch.equal(work.tensor("one", "x"), tensor)
    with pytest.raises(UsageError, match=r"work of another encode \(seed differ\)"):
        check_work(tmp_path / "work", {"seed": 1})


@pytest.mark.parametrize("left", [(), (".lock",), (".lock", ".key.json.unfinished")])
def test_a_work_folder_begun_and_killed_at_once_is_begun_again(left: tuple[str, ...], tmp_path: Path) -> None:
    for name in left:
        (tmp_path / name).write_text("{")
    with open_work(tmp_path, KEY) as work:
        work.save("one", {})
    check_work(tmp_path, KEY)


@pytest.mark.parametrize("name", ["letter.txt", ".draft.unfinished", ".notes", "key.json", "experts-1-0.safetensors"])
@pytest.mark.parametrize("text", ["", "[]", "\udcff"])
def test_somebody_elses_folder_is_refused_and_left_as_it_is(name: str, text: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text, errors="surrogateescape")
    (tmp_path / ".other.unfinished").touch()
    before = contents(tmp_path)
    with pytest.raises(UsageError, match=r"remove it or choose another"), open_work(tmp_path, KEY):
        pass
    with pytest.raises(UsageError, match=r"not empty; give a new or empty folder"), claimed(tmp_path):
        pass
    assert contents(tmp_path) == before


def test_a_second_encode_is_kept_out_while_the_first_is_at_work(tmp_path: Path) -> None:
    busy = pytest.raises(
        UsageError,
        match=rf"another encode is at work in this folder \(process {os.getpid()} on .+\); wait until it ends",
    )
    with open_work(tmp_path / "work", KEY):
        with busy as caught, open_work(tmp_path / "work", KEY):
            pass
        assert str(caught.value).startswith(f"{tmp_path / 'work'}: ")
    with open_work(tmp_path / "work", KEY):
        pass
    with claimed(tmp_path / "result"):
        (tmp_path / "result" / "model.safetensors").touch()
        with busy, claimed(tmp_path / "result"):
            pass
        assert (tmp_path / "result" / MARKER).exists()
    assert list(contents(tmp_path / "result")) == ["model.safetensors"]
    with pytest.raises(UsageError, match="not empty"), claimed(tmp_path / "result"):
        pass


def test_a_result_cut_short_is_discarded_and_one_overwritten_later_named(tmp_path: Path) -> None:
    with open_work(tmp_path / "work", KEY) as work:
        for name in ("cut", "empty", "whole"):
            work.save(name, {"x": torch.ones(100)})
    cut, empty = tmp_path / "work" / "cut.safetensors", tmp_path / "work" / "empty.safetensors"
    os.truncate(cut, cut.stat().st_size - 1)
    os.truncate(empty, 0)
    with open_work(tmp_path / "work", KEY) as work:
        assert work.discard_damaged() == [cut, empty]
        assert [work.has(name) for name in ("cut", "empty", "whole")] == [False, False, True]
        os.truncate(tmp_path / "work" / "whole.safetensors", 10)
        for read in (lambda: work.load("whole"), lambda: work.tensor("whole", "x")):
            with pytest.raises(UsageError, match=r"whole\.safetensors: damaged \(.*\); start the encode again"):
                read()


def test_clearing_removes_results_and_leaves_what_somebody_put_there(tmp_path: Path) -> None:
    for name in ("mine", "shared"):
        with open_work(tmp_path / name, KEY) as work:
            work.save("one", {})
            (tmp_path / "shared").mkdir(exist_ok=True)
            work.clear() if name == "mine" else (tmp_path / name / "letter.txt").touch()
    assert not (tmp_path / "mine").exists()
    Work(tmp_path / "shared").clear()
    assert list(contents(tmp_path / "shared")) == ["letter.txt"]
