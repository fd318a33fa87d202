"""Where a checkpoint comes from: an https folder, a hub's repository, or a folder of this machine."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol
from urllib.parse import quote, unquote, urlsplit, urlunsplit

from vqserve.format.errors import UsageError
from vqserve.format.manifest import MANIFEST, plain_file
from vqserve_ops.errors import FailedError

CHUNK = 1 << 20
"""Bytes that are read at a time, at most."""
HUB = "https://huggingface.co"
_HUB_NAME = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(@(?P<revision>[^?#@\s]+))?")


class InterruptedSourceError(Exception):
    """The source failed in a way that another try may mend.

    Args:
        problem: What happened.
        wait: Seconds that the source asks for.
    """

    def __init__(self, problem: str, wait: float | None = None) -> None:
        super().__init__(problem)
        self.wait = wait


@dataclass(frozen=True)
class Opened:
    """The content of a file from some byte on.

    Attributes:
        offset: Where it begins: the offset asked for, or 0.
        validator: What names this state of the file to the source; empty if nothing does.
        length: Bytes that are to come, as the source says; None if it does not.
        chunks: The content.
    """

    offset: int
    validator: str
    length: int | None
    chunks: Iterator[bytes]


class Source(Protocol):
    """A folder with `manifest.json` and the files that it names."""

    @property
    def name(self) -> str:
        """What the marker and errors call it: without query, which may hold a signature."""

    def where(self, name: str) -> str:
        """What errors call one of its files."""

    def open(self, name: str, offset: int, validator: str) -> AbstractContextManager[Opened]:
        """Opens a file at `offset`, or at 0 if it is not any more what `validator` names.

        Raises:
            InterruptedSourceError: Another try may do.
            FailedError: None would.
        """


@dataclass(frozen=True)
class Folder:
    """A checkpoint's folder on this machine."""

    path: Path

    @property
    def name(self) -> str:
        """The folder."""
        return str(self.path)

    def where(self, name: str) -> str:
        """The file."""
        return str(self.path / name)

    @contextmanager
    def open(self, name: str, offset: int, validator: str) -> Iterator[Opened]:
        """Opens a file; what changed since is another modification time."""
        path = self.path / name if name == MANIFEST else plain_file(self.path, name, MANIFEST, links=True)
        try:
            with path.open("rb") as file:
                state = os.fstat(file.fileno())
                found = f"{state.st_size}-{state.st_mtime_ns}"
                start = offset if found == validator else 0
                file.seek(start)
                yield Opened(start, found, state.st_size - start, iter(lambda: file.read(CHUNK), b""))
        except (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError) as error:
            if error.filename != str(path):
                raise
            raise FailedError(f"{path}: cannot be read ({error.strerror}); name a checkpoint's folder") from error


@dataclass(frozen=True)
class Address:
    """The URL of a folder: files are asked for under it, with its query.

    Attributes:
        base: Scheme, host and path, ending in a slash.
        query: What follows the question mark, such as a signature; never shown.
        shown: What the marker and errors call it.
    """

    base: str
    query: str
    shown: str

    def of(self, name: str) -> str:
        """The URL of a file."""
        url = self.base + quote(name)
        return f"{url}?{self.query}" if self.query else url


def parse(text: str) -> Address | Folder:
    """What a source is, from how it is written.

    Raises:
        UsageError: It is written in no way that is known, or holds a password.
    """
    scheme, found, rest = text.partition("://")
    if not found:
        return Folder(Path(text).absolute())
    if scheme == "file":
        return Folder(Path(unquote(urlsplit(text).path)))
    if scheme == "hf":
        return _hub(rest)
    if scheme not in ("http", "https"):
        raise UsageError(f"{scheme}://: expected https://, http://, hf:// or a path; give the store's https address")
    parts = urlsplit(text)
    if "@" in parts.netloc or not parts.hostname:
        raise UsageError(f"{scheme}:// address: expected a host without user or password; use --token-file")
    path = parts.path.removesuffix(MANIFEST)
    base = urlunsplit((scheme, parts.netloc, path if path.endswith("/") else f"{path}/", "", ""))
    return Address(base, parts.query, base)


def _hub(rest: str) -> Address:
    match = _HUB_NAME.fullmatch(rest.rstrip("/"))
    if match is None:
        raise UsageError(f"hf://{rest}: expected hf://organization/name@revision; take it from the model's page")
    hub = os.environ.get("HF_ENDPOINT", HUB).rstrip("/")
    revision = match["revision"] or "main"
    base = f"{hub}/{match['repo']}/resolve/{quote(revision, safe='')}/"
    return Address(base, "", f"hf://{match['repo']}@{revision}")
