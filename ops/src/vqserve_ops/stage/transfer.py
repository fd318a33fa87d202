"""Brings files from a source into a folder: in parallel, going on where it stopped, trusting the manifest alone."""

from __future__ import annotations

import errno
import hashlib
import queue
import random
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from vqserve.format.errors import UsageError
from vqserve.format.manifest import FileRecord
from vqserve_ops.errors import FailedError
from vqserve_ops.stage import folder as folders
from vqserve_ops.stage.folder import Destination
from vqserve_ops.stage.http import RangeError
from vqserve_ops.stage.progress import Progress
from vqserve_ops.stage.sources import CHUNK, InterruptedSourceError, Opened, Source

TRIES = 10
"""In a row without one byte coming; with the pauses below some five minutes."""
PAUSE, LONGEST_PAUSE = 0.5, 60.0
"""Seconds before the second try, doubled each time up to the longest; a source may ask for up to twice that."""
_PATIENCE = 1.0
"""Seconds for workers to end by themselves; one that waits for the source is left behind."""
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class WrongContentError(Exception):
    """What came is not what the manifest says."""


class Stopped(BaseException):
    """Ends a worker."""


class Transfer:
    """One run of staging.

    Args:
        source: From where.
        destination: To where.
        records: The files.
    """

    def __init__(self, source: Source, destination: Destination, records: Mapping[str, FileRecord]) -> None:
        self.progress = Progress(sum(record.size for record in records.values()), len(records))
        self._source = source
        self._to = destination
        self._records = records
        self._stop = threading.Event()
        self._errors: list[BaseException] = []

    def keep_what_is_right(self, parallel: int, report: Callable[[], object], every: float) -> dict[str, FileRecord]:
        """Checks what is in the folder already.

        Returns:
            The files that are not.
        """
        missing = {}

        def look(name: str) -> None:
            record, path = self._records[name], self._to.path / name
            if path.is_file() and path.stat().st_size == record.size:
                if self._hash(path).hexdigest() == record.sha256:
                    folders.make_readable(path)
                    self.progress.finished()
                    return
                self.progress.found(-record.size)
            missing[name] = record

        self._each(list(self._records), look, parallel, report, every)
        return {name: missing[name] for name in self._records if name in missing}

    def check_room(self, missing: Mapping[str, FileRecord]) -> None:
        """Compares what is to come with the free space, counting what its coming frees.

        Raises:
            UsageError: It does not fit.
        """
        to_come = 0
        for name, record in missing.items():
            path, part = self._to.path / name, self._to.part(name, record)
            to_come += record.size - sum(file.stat().st_size for file in (path, part) if file.is_file())
        if to_come > (free := folders.free_bytes(self._to.path)):
            found = f"{to_come:,} bytes are to come and {free:,} are free"
            raise UsageError(f"{self._to.path}: {found}; enlarge the volume (model.download.volume.size) or make room")

    def fetch(
        self, missing: Mapping[str, FileRecord], parallel: int, report: Callable[[], object], every: float
    ) -> None:
        """Fetches files, the largest first.

        Raises:
            FailedError: The source failed for good.
            UsageError: The disk is full.
        """
        for name in missing:
            path = self._to.path / name
            if path.is_file() or path.is_symlink():
                path.unlink()
        names = sorted(missing, key=lambda name: -missing[name].size)
        self._each(names, lambda name: self._fetch_file(name, missing[name]), parallel, report, every)

    def _each(
        self,
        names: list[str],
        work: Callable[[str], None],
        parallel: int,
        report: Callable[[], object],
        every: float,
    ) -> None:
        """Does `work` for each name in daemon threads, which an interrupt does not wait for."""
        waiting: queue.SimpleQueue[str] = queue.SimpleQueue()
        for name in names:
            waiting.put(name)
        threads = [
            threading.Thread(target=self._worker, args=(waiting, work), daemon=True)
            for _ in range(min(parallel, len(names)))
        ]
        for thread in threads:
            thread.start()
        told = time.monotonic()
        try:
            while any(thread.is_alive() for thread in threads) and not self._stop.is_set():
                time.sleep(0.05)
                if time.monotonic() - told >= every:
                    told = time.monotonic()
                    report()
        finally:
            self._stop.set()
            until = time.monotonic() + _PATIENCE
            for thread in threads:
                thread.join(max(0.0, until - time.monotonic()))
        if self._errors:
            raise self._errors[0]
        self._stop.clear()

    def _worker(self, waiting: queue.SimpleQueue[str], work: Callable[[str], None]) -> None:
        try:
            while not self._stop.is_set():
                work(waiting.get_nowait())
        except (queue.Empty, Stopped):
            pass
        except BaseException as error:  # noqa: BLE001 - told to the main thread, which raises it
            self._errors.append(error)
            self._stop.set()

    def _fetch_file(self, name: str, record: FileRecord) -> None:
        """Fetches a file; content that is wrong is fetched anew once."""
        for again in (True, False):
            try:
                self._fetch_part(name, record)
                self._to.validator(name, record).unlink(missing_ok=True)
                folders.place(self._to.part(name, record), self._to.path / name)
                self.progress.finished()
                return
            except WrongContentError as error:
                self._clear(name, record)
                if not again:
                    where = self._source.where(name)
                    remedy = "the source does not hold what its manifest says: have it put there anew"
                    raise FailedError(f"{where}: {error}, twice; {remedy}") from error
            except OSError as error:
                if error.errno not in _NO_ROOM:
                    raise
                free = f"{folders.free_bytes(self._to.path):,} bytes free"
                remedy = "enlarge the volume and run it again: it goes on where it stopped"
                raise UsageError(f"{self._to.path / name}: the disk is full, {free}; {remedy}") from error

    def _fetch_part(self, name: str, record: FileRecord) -> None:
        """Completes the part of a file, in as many tries as the source needs as long as bytes come.

        Raises:
            WrongContentError: It is complete, and not what the manifest says; or the source has more than that.
            FailedError: Nothing came in all of the tries.
        """
        part, in_vain = self._to.part(name, record), 0
        part.touch()
        if part.stat().st_size > record.size:
            self._clear(name, record, counted=False)
            part.touch()
        digest = self._hash(part)
        here = furthest = part.stat().st_size
        while here < record.size:
            try:
                with self._source.open(name, here, self._tag(name, record)) as opened:
                    if opened.offset < here:
                        self._clear(name, record)
                        digest = hashlib.sha256()
                    self._write(name, record, opened, digest)
                problem = InterruptedSourceError("the answer ended early")
            except RangeError as error:
                self._clear(name, record)
                digest, problem = hashlib.sha256(), error
            except InterruptedSourceError as error:
                problem = error
            here = part.stat().st_size if part.exists() else 0
            if here < record.size:
                in_vain = 0 if here > furthest else in_vain + 1  # a source without ranges may begin anew for ever
                furthest = max(furthest, here)
                self._pause(name, in_vain, problem)
        if (found := digest.hexdigest()) != record.sha256:
            raise WrongContentError(f"expected sha256 {record.sha256}, found {found}")

    def _write(self, name: str, record: FileRecord, opened: Opened, digest: hashlib._Hash) -> None:
        """Appends what comes to the part, and to the digest of what is in it."""
        if opened.length is not None and opened.offset + opened.length > record.size:
            raise WrongContentError(f"expected {record.size:,} bytes, found {opened.offset + opened.length:,}")
        self._to.validator(name, record).write_text(opened.validator, "utf-8")
        here = opened.offset
        with self._to.part(name, record).open("ab", buffering=0) as part:
            for chunk in opened.chunks:
                if self._stop.is_set():
                    raise Stopped
                if here + len(chunk) > record.size:
                    raise WrongContentError(f"expected {record.size:,} bytes, found more")
                rest = memoryview(chunk)
                while rest:  # an unbuffered file may take a chunk in pieces
                    rest = rest[part.write(rest) or 0 :]
                digest.update(chunk)
                here += len(chunk)
                self.progress.came(len(chunk))

    def _pause(self, name: str, in_vain: int, problem: InterruptedSourceError) -> None:
        if in_vain >= TRIES:
            found = f"{self._source.where(name)}: {problem}, in {in_vain} tries"
            raise FailedError(f"{found}; run it again later: it goes on where it stopped")
        if self._stop.wait(pause_seconds(in_vain, problem.wait)):
            raise Stopped

    def _hash(self, path: Path) -> hashlib._Hash:
        """The digest of what is in a file already."""
        digest = hashlib.sha256()
        with path.open("rb") as file:
            while chunk := file.read(CHUNK):
                if self._stop.is_set():
                    raise Stopped
                digest.update(chunk)
                self.progress.found(len(chunk))
        return digest

    def _clear(self, name: str, record: FileRecord, *, counted: bool = True) -> None:
        part = self._to.part(name, record)
        if counted and part.exists():
            self.progress.found(-part.stat().st_size)
        self._to.clear(name, record)

    def _tag(self, name: str, record: FileRecord) -> str:
        try:
            return self._to.validator(name, record).read_text("utf-8")
        except (OSError, UnicodeDecodeError):
            return ""


def pause_seconds(in_vain: int, asked: float | None) -> float:
    """How long to wait after so many tries in vain, at least as long as the source asks for within reason."""
    seconds: float = min(PAUSE * 2.0**in_vain, LONGEST_PAUSE) * random.uniform(0.5, 1)
    return max(seconds, min(asked or 0.0, 2 * LONGEST_PAUSE))


def pause_before(in_vain: int, asked: float | None) -> None:
    """Waits so long."""
    time.sleep(pause_seconds(in_vain, asked))
