"""The folder that a checkpoint is staged into: its lock, parts, marker, and what is in it already."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from vqserve.format.errors import CheckpointError, UsageError
from vqserve.format.manifest import MANIFEST, FileRecord, check_sizes, read_manifest, sha256_file
from vqserve_ops.errors import FailedError

_MODE = 0o644
"""Of files in place: the engine may run as another user."""


@dataclass(frozen=True)
class Destination:
    """A checkpoint's folder, and what staging keeps in it."""

    path: Path

    @property
    def state(self) -> Path:
        """What is staging's own; the format's checks pass over `.cache`."""
        return self.path / ".cache" / "vqserve-stage"

    @property
    def incoming(self) -> Path:
        """The folder of the manifest of what is being staged."""
        return self.state / "incoming"

    @property
    def marker(self) -> Path:
        """There last, and only if everything else is."""
        return self.state / "staged.json"

    def part(self, name: str, record: FileRecord) -> Path:
        """Where a file is while it comes; another content is another part."""
        return self.state / f"{name}.{record.sha256[:16]}.part"

    def validator(self, name: str, record: FileRecord) -> Path:
        """What the source called the content that the part is of."""
        return self.state / f"{name}.{record.sha256[:16]}.tag"

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keeps a second stager out.

        Raises:
            FailedError: There is one.
            UsageError: The folder cannot be written to.
        """
        try:
            self.incoming.mkdir(parents=True, exist_ok=True)
            lock = os.open(self.state / "lock", os.O_RDWR | os.O_CREAT, _MODE)
        except OSError as error:
            problem = f"cannot be written to ({error.strerror})"
            raise UsageError(f"{self.path}: {problem}; make it a folder of user {os.getuid()}'s") from error
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(lock)
            raise FailedError(f"{self.path}: another `stage` is writing to it; wait for its end, or end it") from error
        try:
            yield
        finally:
            os.close(lock)

    def is_staged(self, source: str, manifest_sha256: str | None) -> bool:
        """Whether the marker is of this source and manifest, and the files are all there in their sizes."""
        try:
            said = json.loads(self.marker.read_text("utf-8"))
            found = (said["source"], said["manifest_sha256"])
            if found != (source, manifest_sha256 or found[1]) or sha256_file(self.path / MANIFEST) != found[1]:
                return False
            check_sizes(self.path, read_manifest(self.path))
        except (OSError, ValueError, KeyError, TypeError, CheckpointError):
            return False
        return True

    def mark(self, source: str, manifest_sha256: str) -> None:
        """Says that everything is there."""
        unfinished = self.marker.with_suffix(".unfinished")
        unfinished.write_text(json.dumps({"source": source, "manifest_sha256": manifest_sha256}) + "\n", "utf-8")
        place(unfinished, self.marker)

    def begin(self, manifest: bytes, records: Mapping[str, FileRecord]) -> None:
        """Takes the folder from what it held before: no manifest is left that would call a mixture a checkpoint.

        Raises:
            UsageError: It holds something that is neither this checkpoint's nor that of an earlier one.
        """
        before: Mapping[str, FileRecord] = {}
        with suppress(CheckpointError):
            before = read_manifest(self.path)
        surplus: list[CheckpointError] = []
        check_sizes(self.path, {}, surplus.append)
        present = [Path(problem.where).name for problem in surplus]
        for name in present:
            if name not in records and name not in before:
                problem = "expected an empty folder or a checkpoint's, found this"
                raise UsageError(f"{self.path / name}: {problem}; remove it, or stage into another folder")
            if (self.path / name).is_symlink() or not (self.path / name).is_file():
                raise UsageError(f"{self.path / name}: expected a regular file; remove it")
        self.marker.unlink(missing_ok=True)
        if not (self.path / MANIFEST).is_file() or (self.path / MANIFEST).read_bytes() != manifest:
            (self.path / MANIFEST).unlink(missing_ok=True)
            sync(self.path)
        for name in present:
            if name not in records:
                (self.path / name).unlink()
        ours = {path.name for name, record in records.items() for path in self._of(name, record)}
        for path in self.state.iterdir():
            if path.suffix in (".part", ".tag", ".unfinished") and path.name not in ours:
                path.unlink()

    def _of(self, name: str, record: FileRecord) -> tuple[Path, Path]:
        return self.part(name, record), self.validator(name, record)

    def clear(self, name: str, record: FileRecord) -> None:
        """Removes what came of a file."""
        for path in self._of(name, record):
            path.unlink(missing_ok=True)

    def arrived(self, name: str, record: FileRecord) -> int:
        """Bytes of a file that are here."""
        for path in (self.path / name, self.part(name, record)):
            with suppress(OSError):
                return min(path.stat().st_size, record.size)
        return 0

    def finish(self, manifest: bytes, source: str) -> None:
        """Puts the manifest in its place, and the marker last."""
        unfinished = self.state / "manifest.unfinished"
        unfinished.write_bytes(manifest)
        place(unfinished, self.path / MANIFEST)
        self.mark(source, hashlib.sha256(manifest).hexdigest())


def place(unfinished: Path, path: Path) -> None:
    """Has a complete file appear under its name, readable by all, and on disk."""
    make_readable(unfinished)
    sync(unfinished)
    unfinished.replace(path)
    sync(path.parent)


def make_readable(path: Path) -> None:
    """Lets the engine read a file as whatever user."""
    if path.stat().st_mode & _MODE != _MODE:
        path.chmod(_MODE)


def sync(path: Path) -> None:
    """Waits until a file, or the names in a folder, are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def free_bytes(path: Path) -> int:
    """What a user without privileges may still write there."""
    state = os.statvfs(path)
    return state.f_bavail * state.f_frsize
