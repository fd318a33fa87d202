"""The work folder: results of finished steps, each written under a temporary name and then renamed.

Every step is a pure function of the parent, the calibration text, the options, and files of earlier steps. So an
encode killed at any instant goes on where it was and ends with the same bytes.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from vqserve.format.atomic import no_room, remove_unfinished, replacing, unfinished_name, write_whole, writing
from vqserve.format.errors import UsageError

_KEY = "key.json"
_LOCK = ".lock"


def save_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Writes a safetensors file that appears whole or not at all.

    Raises:
        UsageError: The disk is full, or the file cannot be written for another reason.
    """
    nbytes, free = sum(tensor.nbytes for tensor in tensors.values()), shutil.disk_usage(path.parent).free
    if nbytes > free:
        raise no_room(path, f"{nbytes:,} bytes needed")
    with replacing(path) as unfinished:
        try:
            save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, unfinished, {"format": "pt"})
        except SafetensorError as cause:  # of an OSError
            raise no_room(path, f"cannot be written ({cause}), {nbytes:,} bytes needed") from cause


def make_folder(folder: Path) -> list[Path]:
    """Makes a folder and those around it, as far as they do not exist.

    Returns:
        Those that were made, the folder first.

    Raises:
        UsageError: It cannot be made.
    """
    lacking = [path for path in (folder, *folder.parents) if not os.path.lexists(path)]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as cause:
        dangling = folder.is_symlink() and not folder.exists()
        problem = "is a link to nothing" if dangling else f"cannot be made ({cause.strerror})"
        raise UsageError(f"{folder}: {problem}; choose another place for the folder") from cause
    return lacking


def open_locked(path: Path, flags: int) -> int:
    """Opens a file and locks it for as long as it is open; the system lets go of a killed process's locks.

    Args:
        path: The file; what is locked is the folder it is in.
        flags: Of `os.open`, besides reading and writing.

    Returns:
        The file descriptor.

    Raises:
        UsageError: Another encode holds the lock; the message says which. Or the file cannot be written.
    """
    with writing(path):
        descriptor = os.open(path, os.O_RDWR | flags, 0o666)
        try:
            _lock(descriptor, path.parent)
            os.ftruncate(descriptor, 0)
            os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode())
        except BaseException as error:
            if flags & os.O_EXCL and isinstance(error, OSError):  # made here, locked, and of no use
                path.unlink()
            os.close(descriptor)
            raise
    return descriptor


def _lock(descriptor: int, folder: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as cause:
        holder = os.read(descriptor, 100).decode(errors="replace") or "one that has just begun"
        problem = f"another encode is at work in this folder ({holder})"
        raise UsageError(f"{folder}: {problem}; wait until it ends, or choose another") from cause


class Work:
    """Named results on disk."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def has(self, name: str) -> bool:
        """Whether the result is there, complete."""
        return self._path(name).is_file()

    def save(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Writes a result; it appears whole or not at all."""
        save_tensors(self._path(name), tensors)

    def load(self, name: str) -> dict[str, Tensor]:
        """Reads a result.

        Raises:
            UsageError: It was damaged after the encode began.
        """
        with self._telling(name) as path:
            tensors: dict[str, Tensor] = load_file(path)
        return tensors

    def tensor(self, name: str, key: str) -> Tensor:
        """Reads one tensor of a result; raises as `load`."""
        with self._telling(name) as path, safe_open(path, "pt") as file:
            tensor: Tensor = file.get_tensor(key)
        return tensor

    def remove(self, name: str) -> None:
        """Removes a result that is no longer needed."""
        self._path(name).unlink(missing_ok=True)

    def discard_damaged(self) -> list[Path]:
        """Removes results that are cut short or overwritten, so that their steps run again; returns their paths."""
        damaged = []
        for path in sorted(self.folder.glob("*.safetensors")):
            try:
                with safe_open(path, "pt"):
                    pass
            except SafetensorError:
                path.unlink()
                damaged.append(path)
        return damaged

    def clear(self) -> None:
        """Removes all results, and the folder if nothing else is in it."""
        for path in (*self.folder.glob("*.safetensors"), self.folder / _KEY, self.folder / _LOCK):
            path.unlink()
        if not any(self.folder.iterdir()):
            self.folder.rmdir()

    @contextmanager
    def _telling(self, name: str) -> Iterator[Path]:
        path = self._path(name)
        try:
            yield path
        except SafetensorError as cause:
            raise UsageError(f"{path}: damaged ({cause}); start the encode again: it repeats this step") from cause

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.safetensors"


def check_work(folder: Path, key: Mapping[str, Any]) -> None:
    """Checks that a folder can hold, or holds already, results for a key; changes nothing.

    Raises:
        UsageError: It holds results for another key, or something else.
    """
    if not folder.exists():
        return
    if not folder.is_dir():
        raise UsageError(f"{folder}: is a file; choose another place for the work folder")
    path = folder / _KEY
    if path.is_file():
        if (found := path.read_bytes()) != _text(key).encode():
            what = _difference(found, key)
            raise UsageError(f"{folder}: holds work of another encode ({what} differ); remove it or choose another")
    elif any(found.name not in (_LOCK, unfinished_name(path).name) for found in folder.iterdir()):
        raise UsageError(f"{folder}: not empty and not a work folder; remove it or choose another")


@contextmanager
def open_work(folder: Path, key: Mapping[str, Any]) -> Iterator[Work]:
    """Opens a work folder, made if it does not exist, and keeps other encodes out of it.

    Args:
        folder: The folder.
        key: What the results depend on, as JSON.

    Raises:
        UsageError: Another encode is at work in it, or it cannot be made or written; or see `check_work`.
    """
    check_work(folder, key)
    make_folder(folder)
    descriptor = open_locked(folder / _LOCK, os.O_CREAT)
    try:
        check_work(folder, key)  # another encode may have begun one before the lock was ours
        remove_unfinished(folder)
        if not (folder / _KEY).is_file():
            write_whole(folder / _KEY, _text(key))
        yield Work(folder)
    finally:
        os.close(descriptor)


def _text(key: Mapping[str, Any]) -> str:
    return json.dumps(key, indent=1, sort_keys=True) + "\n"


def _difference(found: bytes, key: Mapping[str, Any]) -> str:
    """The top-level keys whose values are not the same."""
    try:
        other = json.loads(found)
    except ValueError:
        other = None
    if not isinstance(other, dict):
        return "formats"
    return ", ".join(sorted(name for name in {*other, *key} if other.get(name) != key.get(name))) or "formats"
