"""The work folder: results of finished steps, each written under a temporary name and then renamed.

Every step is a pure function of the parent, the calibration text, the options, and files of earlier steps. So an
encode killed at any instant goes on where it was and ends with the same bytes.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from vqserve.format.errors import UsageError

_KEY = "key.json"
_UNFINISHED = ".unfinished"


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Gives a temporary name to write to, and renames it to `path` once it is complete and on disk."""
    unfinished = path.with_name(f".{path.name}{_UNFINISHED}")
    unfinished.touch()
    mode = unfinished.stat().st_mode
    yield unfinished
    unfinished.chmod(mode)  # safetensors would leave its files unreadable for others
    with unfinished.open("rb+") as file:
        os.fsync(file.fileno())
    unfinished.replace(path)


def remove_unfinished(folder: Path) -> None:
    """Removes what an interrupted write left behind."""
    for path in folder.glob(f".*{_UNFINISHED}"):
        path.unlink()


class Work:
    """Named results on disk, valid for one key.

    Args:
        folder: Made if it does not exist.
        key: What the results depend on, as JSON.

    Raises:
        UsageError: The folder holds results for another key, or something else.
    """

    def __init__(self, folder: Path, key: Mapping[str, Any]) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        remove_unfinished(folder)
        text = json.dumps(key, indent=1, sort_keys=True) + "\n"
        path = folder / _KEY
        if path.is_file():
            found = path.read_text(encoding="utf-8")
            if found != text:
                what = _difference(found, key)
                raise UsageError(f"{folder}: holds work of another encode ({what} differ); remove it or choose another")
        elif any(folder.iterdir()):
            raise UsageError(f"{folder}: not empty and not a work folder; remove it or choose another")
        else:
            with replacing(path) as unfinished:
                unfinished.write_text(text, encoding="utf-8")

    def has(self, name: str) -> bool:
        """Whether the result is there, complete."""
        return self._path(name).is_file()

    def save(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Writes a result; it appears whole or not at all."""
        with replacing(self._path(name)) as unfinished:
            save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, unfinished)

    def load(self, name: str) -> dict[str, Tensor]:
        """Reads a result."""
        tensors: dict[str, Tensor] = load_file(self._path(name))
        return tensors

    def tensor(self, name: str, key: str) -> Tensor:
        """Reads one tensor of a result."""
        with safe_open(self._path(name), "pt") as file:
            tensor: Tensor = file.get_tensor(key)
        return tensor

    def remove(self, name: str) -> None:
        """Removes a result that is no longer needed."""
        self._path(name).unlink(missing_ok=True)

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.safetensors"


def _difference(found: str, key: Mapping[str, Any]) -> str:
    """The top-level keys whose values are not the same."""
    try:
        other = json.loads(found)
    except ValueError:
        other = {}
    return ", ".join(sorted(name for name in {*other, *key} if other.get(name) != key.get(name))) or "formats"
