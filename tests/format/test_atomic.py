"""Files that appear whole, are on disk when they do, and of which nothing is left where there is no room."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from vqserve.format.atomic import replacing, write_whole
from vqserve.format.errors import UsageError


def test_a_file_is_on_disk_before_its_name_is_and_its_name_at_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[str, str]] = []
    sync, rename = os.fsync, os.replace

    def synced(descriptor: int) -> None:
        seen.append(("on disk", Path(f"/proc/self/fd/{descriptor}").readlink().name))
        sync(descriptor)

    def renamed(source: Path, target: Path) -> None:
        assert Path(source).read_text() == "content"
        seen.append(("named", Path(target).name))
        rename(source, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", renamed)
    write_whole(tmp_path / "x.json", "content")
    assert seen == [("on disk", ".x.json.unfinished"), ("named", "x.json"), ("on disk", tmp_path.name)]
    assert (tmp_path / "x.json").read_text() == "content"


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
@pytest.mark.parametrize("function", ["pathlib.Path.write_text", "os.fsync"])
def test_a_full_disk_is_said_with_file_room_and_remedy_and_leaves_the_old_file(
    function: str, number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: object, **more: object) -> None:
        raise OSError(number, os.strerror(number))

    (tmp_path / "x").write_text("old")
    monkeypatch.setattr(function, full)
    problem = (
        rf"/x: cannot be written \({os.strerror(number)}\), [\d,]+ bytes free; make room and run the command again"
    )
    with pytest.raises(UsageError, match=problem):
        write_whole(tmp_path / "x", "new")
    assert [path.name for path in tmp_path.iterdir()] == ["x"]
    assert (tmp_path / "x").read_bytes() == b"old"


def test_a_place_that_is_not_writable_is_said_with_a_remedy(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match=r"/x: cannot be written \(Not a directory\); choose another place"):
        write_whole(tmp_path / "file" / "x", "")


def test_an_error_of_what_is_written_is_not_one_of_the_disk(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), replacing(tmp_path / "x"):
        (tmp_path / "nothing").read_bytes()
    assert not list(tmp_path.iterdir())
