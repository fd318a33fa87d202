"""`manifest.json`: size and sha256 of every file of a checkpoint but itself."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from vqserve.format.atomic import replacing, unfinished_name, write_whole
from vqserve.format.errors import CheckpointError, ManifestError
from vqserve.format.strict_json import LFS_REMEDY, POINTER_FOUND, is_pointer, read_object

MANIFEST = "manifest.json"
MANIFEST_VERSION = 1

Report = Callable[[CheckpointError], object]
"""What a check does with something wrong: raise it (`refuse`), or note it and go on to the next."""

# Also what keeps a path inside the folder: no separator, no leading dot, no longer than a file system takes.
_PLAIN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._+-]{0,200}")
_AROUND = (".git", ".gitattributes", ".cache", "lost+found")
"""What hubs, git and file systems put beside a checkpoint's files; nothing reads it."""
_DIGEST = re.compile(r"[0-9a-f]{64}")
_RESTORE = "restore the checkpoint from where it came from"


@dataclass(frozen=True)
class FileRecord:
    """What the manifest says about one file.

    Attributes:
        size: Bytes.
        sha256: Digest in lower-case hexadecimal.
    """

    size: int
    sha256: str


def refuse(problem: CheckpointError) -> NoReturn:
    """The `Report` of a check that stops at the first thing wrong."""
    raise problem


def sha256_file(path: Path) -> str:
    """The sha256 of a file's content in lower-case hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def plain_file(folder: Path, name: str, source: str, *, links: bool = False) -> Path:
    """The path of a file called `name` in `folder`.

    Args:
        folder: The checkpoint.
        name: The name as `source` gives it.
        source: What names it, for the error.
        links: Whether it may be a link to a file outside.

    Raises:
        ManifestError: The name is not a plain file name, or there is no such regular file, or it lies outside. What a
            snapshot in the cache of a model hub links to, a blob of the same repository, does not.
    """
    if _PLAIN_NAME.fullmatch(name) is None:
        problem = f"expected plain file names inside the folder, found {name}"
        raise ManifestError(f"{folder}: {source}", problem, "do not use this checkpoint: it points outside itself")
    path = folder / name
    if not path.is_file():
        problem = "is a dangling link" if path.is_symlink() else "is missing, or is not a regular file"
        raise ManifestError(str(path), f"named by {source}, but {problem}", _RESTORE)
    if not links and not any(path.resolve().is_relative_to(place) for place in _inside(folder.resolve())):
        problem = f"expected a file inside the folder, found a link to {path.resolve()}"
        raise ManifestError(str(path), problem, "copy the checkpoint with its links followed (cp -rL)")
    return path


def _inside(folder: Path) -> list[Path]:
    """The places that belong to a checkpoint: its folder and, in a hub's cache, the repository's blobs."""
    is_snapshot = folder.parent.name == "snapshots" and folder.parents[1].name.startswith("models--")
    return [folder, *([folder.parents[1] / "blobs"] if is_snapshot else [])]


def build_manifest(folder: Path) -> dict[str, FileRecord]:
    """Size and digest of every file in `folder`; subfolders, hidden files and the manifest itself are not part of it.

    Raises:
        ManifestError: A file has a name that a manifest cannot hold, or is a link out of the folder.
    """
    records = {}
    for name in _visible_files(folder):
        path = plain_file(folder, name, "the folder")
        records[name] = FileRecord(path.stat().st_size, sha256_file(path))
    return records


def write_manifest(folder: Path) -> None:
    """Writes `manifest.json` for the files that are in `folder` now; it appears whole or not at all."""
    write_whole(folder / MANIFEST, _to_json(build_manifest(folder)))


def replace_file(folder: Path, name: str, content: str) -> None:
    """Replaces one text file of a finished checkpoint, and its record in the manifest; no other file is read.

    Both are written out under temporary names first, so that only a kill between two renames can part them.

    Raises:
        ManifestError: The manifest is not valid.
    """
    data = content.encode()
    records = read_manifest(folder) | {name: FileRecord(len(data), hashlib.sha256(data).hexdigest())}
    with replacing(folder / MANIFEST) as manifest, replacing(folder / name) as file:
        file.write_bytes(data)
        manifest.write_text(_to_json(records), encoding="utf-8")


def read_manifest(folder: Path) -> dict[str, FileRecord]:
    """Reads and validates `manifest.json`, without looking at the files it names.

    Raises:
        ManifestError: It is missing, not valid, of another version, or names a file outside the folder.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise ManifestError(str(path), "is missing", "the checkpoint is incomplete: copy or encode it again")
    content = read_object(path, ManifestError)
    if content.get("manifest_version") != MANIFEST_VERSION or isinstance(content.get("manifest_version"), bool):
        problem = f"expected {MANIFEST_VERSION}, found {content.get('manifest_version')!r}"
        raise ManifestError(f"{path}: manifest_version", problem, "install the vqserve release that wrote it")
    if set(content) != {"manifest_version", "files"} or not isinstance(content["files"], Mapping):
        raise ManifestError(str(path), "expected exactly the keys manifest_version and files", _RESTORE)
    return {name: _read_record(path, name, record) for name, record in content["files"].items()}


def check_manifest(folder: Path, digests: bool) -> dict[str, FileRecord]:
    """Checks that the folder holds exactly the files of its manifest.

    Args:
        folder: The checkpoint.
        digests: Whether to compute every file's sha256 as well; sizes are always compared.

    Returns:
        The manifest's records by file name.

    Raises:
        ManifestError: The manifest is not valid, or a file is missing, surplus, or differs.
    """
    records = read_manifest(folder)
    check_sizes(folder, records)
    for name, record in records.items() if digests else ():
        check_digest(folder / name, record, sha256_file(folder / name))
    return records


def check_sizes(folder: Path, records: Mapping[str, FileRecord], report: Report = refuse) -> list[str]:
    """Checks that the folder holds exactly the files of `records`, each in its size, and no subfolder.

    Returns:
        The names of those that are there in their size.

    Raises:
        ManifestError: With `refuse`: a file is missing, surplus, or of another size.
    """
    unfinished = {unfinished_name(folder / name).name for name in (*records, MANIFEST)}
    for name in sorted(path.name for path in folder.iterdir()):
        if name not in records and name not in (MANIFEST, *_AROUND):
            surplus = f"surplus: {MANIFEST} does not name it"
            if name in unfinished:
                surplus = "left by a write that was interrupted"
            report(ManifestError(str(folder / name), surplus, "remove it from the folder"))
    right = []
    for name, record in records.items():
        try:
            path = plain_file(folder, name, MANIFEST)
        except ManifestError as problem:
            report(problem)
            continue
        size = path.stat().st_size
        if size == record.size:
            right.append(name)
        elif is_pointer(path):
            report(ManifestError(str(path), POINTER_FOUND, LFS_REMEDY))
        else:
            report(ManifestError(str(path), f"expected {record.size} bytes, found {size}", _RESTORE))
    return right


def check_digest(path: Path, record: FileRecord, found: str, report: Report = refuse) -> None:
    """Checks the sha256 `found` of a file against its record.

    Raises:
        ManifestError: With `refuse`: it is another.
    """
    if found != record.sha256:
        report(ManifestError(str(path), f"expected sha256 {record.sha256}, found {found}", _RESTORE))


def _to_json(records: Mapping[str, FileRecord]) -> str:
    files = {name: {"size": record.size, "sha256": record.sha256} for name, record in records.items()}
    return json.dumps({"manifest_version": MANIFEST_VERSION, "files": files}, indent=2) + "\n"


def _visible_files(folder: Path) -> list[str]:
    with os.scandir(folder) as entries:
        names = [entry.name for entry in entries if not entry.is_dir(follow_symlinks=False)]
    return sorted(name for name in names if name != MANIFEST and not name.startswith("."))


def _read_record(path: Path, name: str, record: object) -> FileRecord:
    where = f"{path}: {name}"
    if _PLAIN_NAME.fullmatch(name) is None or name == MANIFEST:
        problem = "expected plain names of files inside the folder"
        raise ManifestError(where, problem, "do not use this checkpoint: it points outside itself")
    if not isinstance(record, Mapping) or set(record) != {"size", "sha256"}:
        raise ManifestError(where, "expected exactly the keys size and sha256", _RESTORE)
    size, digest = record["size"], record["sha256"]
    if type(size) is not int or size < 0:
        raise ManifestError(where, f"expected a size in bytes, found {size!r}", _RESTORE)
    if not isinstance(digest, str) or _DIGEST.fullmatch(digest) is None:
        raise ManifestError(where, "expected a sha256 of 64 lower-case hexadecimal digits", _RESTORE)
    return FileRecord(size, digest)
