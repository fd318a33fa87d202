"""Files that appear whole or not at all, and are on disk once they have appeared."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vqserve.format.errors import UsageError

_UNFINISHED = ".unfinished"
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_NOT_OURS = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR)


def no_room(path: Path, reason: str) -> UsageError:
    """The error for a file that does not fit on its disk any more.

    Args:
        path: The file.
        reason: What happened, perhaps with the bytes that it needs.
    """
    place = next(folder for folder in path.absolute().parents if folder.is_dir())
    room = f"{reason}, {shutil.disk_usage(place).free:,} bytes free"
    return UsageError(f"{path}: {room}; make room and run the command again: an encode goes on where it stopped")


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns what writing a file may fail with into an error that a person can act on.

    Raises:
        UsageError: The disk is full, or the place is not writable.
    """
    try:
        yield
    except OSError as cause:
        reason = f"cannot be written ({cause.strerror})"
        if cause.errno in _NO_ROOM:
            raise no_room(path, reason) from cause
        if cause.errno in _NOT_OURS:
            raise UsageError(f"{path}: {reason}; choose another place, or make this one writable") from cause
        raise


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Gives a temporary name to write to, and renames it to `path` once it is complete and on disk.

    What was written is removed if an exception ends the block; a kill leaves it for `remove_unfinished`.

    Raises:
        UsageError: The disk is full, or the place is not writable.
    """
    unfinished = unfinished_name(path)
    with writing(path):
        unfinished.touch()
        mode = unfinished.stat().st_mode
        try:
            yield unfinished
            unfinished.chmod(mode)  # safetensors would leave its files unreadable for others
            _sync(unfinished)
        except BaseException:
            unfinished.unlink(missing_ok=True)
            raise
        unfinished.replace(path)
        _sync(path.parent)


def write_whole(path: Path, content: str) -> None:
    """Writes a text file in UTF-8; raises as `replacing`."""
    with replacing(path) as unfinished:
        unfinished.write_text(content, encoding="utf-8")


def unfinished_name(path: Path) -> Path:
    """Where `path` is written before it is complete."""
    return path.with_name(f".{path.name}{_UNFINISHED}")


def remove_unfinished(folder: Path) -> None:
    """Removes what an interrupted write left behind."""
    for path in folder.glob(f".*{_UNFINISHED}"):
        path.unlink()


def _sync(path: Path) -> None:
    """Waits until a file, or the names in a folder, are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
