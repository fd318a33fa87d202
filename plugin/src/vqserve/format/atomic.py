"""Files that appear whole or not at all, and are on disk once they have appeared."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_UNFINISHED = ".unfinished"


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Gives a temporary name to write to, and renames it to `path` once it is complete and on disk.

    What was written is removed if an exception ends the block; a kill leaves it for `remove_unfinished`.
    """
    unfinished = unfinished_name(path)
    unfinished.touch()
    mode = unfinished.stat().st_mode
    try:
        yield unfinished
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise
    unfinished.chmod(mode)  # safetensors would leave its files unreadable for others
    _sync(unfinished)
    unfinished.replace(path)
    _sync(path.parent)


def write_whole(path: Path, content: str) -> None:
    """Writes a text file in UTF-8."""
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
