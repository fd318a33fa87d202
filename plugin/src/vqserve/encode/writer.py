"""Writes the encoded checkpoint: files of bounded size, each under a temporary name first, the manifest last.

A folder being written holds a hidden marker file, so that a run that was interrupted can go on there, and nothing else
is ever overwritten.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from torch import Tensor

from vqserve.encode.work import make_folder, open_locked, save_tensors
from vqserve.format.atomic import remove_unfinished, replacing, write_whole
from vqserve.format.errors import UsageError
from vqserve.format.files import COMPANIONS, INDEX
from vqserve.format.layout import TensorSpec, checkpoint_specs
from vqserve.format.manifest import MANIFEST, write_manifest
from vqserve.format.names import layer_of

MARKER = ".vqserve-incomplete"
"""Hidden file in a folder whose checkpoint is not complete yet; locked while an encode is at work in it."""
_HEADER_BYTES = 256
"""Allowed per tensor in a file's header."""

Read = Callable[[str], Tensor]


def check_free(folder: Path) -> None:
    """Checks that a result can go to a folder; changes nothing.

    Raises:
        UsageError: It holds something that no interrupted encode left there.
    """
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"{folder}: is a file; give a new or empty folder for the result")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / MARKER).is_file():
        holds = ", and holds a checkpoint" if (folder / MANIFEST).is_file() else ""
        raise UsageError(f"{folder}: not empty{holds}; give a new or empty folder for the result")


@contextmanager
def claimed(folder: Path) -> Iterator[Callable[[], None]]:
    """Marks a folder, made if it does not exist, as being written, and keeps other encodes out of it.

    The mark is lifted at the end, or before it by what is yielded; an exception leaves it, for another encode to go on
    there, unless nothing else is there yet: then nothing is left.

    Raises:
        UsageError: Another encode is at work in it, or it cannot be made or written; or see `check_free`.
    """
    made: list[Path] = []
    descriptor = None
    try:
        while descriptor is None:
            check_free(folder)
            made += make_folder(folder)
            descriptor = _lock_marker(folder)
        remove_unfinished(folder)
        yield (folder / MARKER).unlink
        (folder / MARKER).unlink(missing_ok=True)
    except BaseException:
        if descriptor is not None and [path.name for path in folder.iterdir()] == [MARKER]:
            (folder / MARKER).unlink()
        _remove_empty(made)
        raise
    finally:
        if descriptor is not None:
            os.close(descriptor)


def _remove_empty(folders: Iterable[Path]) -> None:
    """Removes folders, the innermost first, up to the first in which there is something."""
    with suppress(OSError):
        for folder in folders:
            folder.rmdir()


def _lock_marker(folder: Path) -> int | None:
    """Locks the mark of an interrupted encode, or that of a new one; None if another encode began or ended just now."""
    marker = folder / MARKER
    # Never made in a folder with anything in it: that may be the result of an encode that ended since the check.
    try:
        descriptor = open_locked(marker, 0 if any(folder.iterdir()) else os.O_CREAT | os.O_EXCL)
    except (FileExistsError, FileNotFoundError):
        return None
    if os.fstat(descriptor).st_nlink:
        return descriptor
    os.close(descriptor)  # of a file removed before the lock was ours
    return None


def write_checkpoint(
    folder: Path, source: Path, config: Mapping[str, Any], card: str, file_size: int, read: Read
) -> None:
    """Writes a checkpoint into a claimed folder.

    Args:
        folder: Claimed before.
        source: The parent's folder, for the tokenizer's files.
        config: The whole `config.json`.
        card: The model card, as Markdown.
        file_size: Bytes that a safetensors file may have; a single tensor may exceed it.
        read: Gives each tensor by name.
    """
    specs = [spec for spec in checkpoint_specs(config).values() if spec.required]
    files = split(sorted(specs, key=_place), file_size)
    names = [f"model-{at + 1:05d}-of-{len(files):05d}.safetensors" for at in range(len(files))]
    for stale in {*folder.glob("model-*.safetensors"), folder / MANIFEST} - {folder / name for name in names}:
        stale.unlink(missing_ok=True)  # of an interrupted encode with other options
    for name, content in zip(names, files, strict=True):
        save_tensors(folder / name, {spec.name: read(spec.name) for spec in content})
    total = sum(spec.nbytes for spec in specs)
    weight_map = {spec.name: name for name, content in zip(names, files, strict=True) for spec in content}
    for name, value in (
        (INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map}),
        ("config.json", config),
    ):
        write_whole(folder / name, json.dumps(value, indent=2, ensure_ascii=False) + "\n")
    for name in COMPANIONS:
        if (source / name).is_file():
            copied = (source / name).read_bytes()
            with replacing(folder / name) as unfinished:
                unfinished.write_bytes(copied)
    write_whole(folder / "README.md", card)
    write_manifest(folder)


def split(specs: Iterable[TensorSpec], file_size: int) -> list[list[TensorSpec]]:
    """Spreads tensors over files in the given order, each file filled up to `file_size` bytes."""
    files: list[list[TensorSpec]] = []
    room = 0
    for spec in specs:
        if not files or spec.nbytes + _HEADER_BYTES > room:
            files.append([])
            room = file_size
        files[-1].append(spec)
        room -= spec.nbytes + _HEADER_BYTES
    return files


def _place(spec: TensorSpec) -> float:
    """Embeddings, then layer by layer, then the final norm and the head."""
    layer = layer_of(spec.name)
    if layer is not None:
        return layer
    return -1 if spec.name.startswith("model.embed") else float("inf")
