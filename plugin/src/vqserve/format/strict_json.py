"""JSON as strictly as the format wants it: UTF-8, one object, no key twice, no NaN."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from vqserve.format.errors import CheckpointError

MAX_FILE_BYTES = 100_000_000

LFS_POINTER = b"version https://git-lfs"
POINTER_FOUND = "expected the file, found a Git LFS pointer to it"
LFS_REMEDY = "fetch the files themselves: git lfs pull"
_RESTORE = "restore the file from where the checkpoint came from"


def parse_object(data: bytes, where: str, error: type[CheckpointError] = CheckpointError) -> dict[str, Any]:
    """Parses one JSON object.

    Args:
        data: The encoded text.
        where: What to call it in an error.
        error: The class of errors raised.

    Raises:
        CheckpointError: As `error`: not UTF-8, not JSON, not an object, or a key occurs twice.
    """
    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=_no_key_twice, parse_constant=_no_constant)
    except UnicodeDecodeError as cause:
        raise error(where, f"expected UTF-8, found byte {data[cause.start]:#04x} at {cause.start}", _RESTORE) from cause
    except RecursionError as cause:
        raise error(where, "expected JSON, found it nested too deeply", _RESTORE) from cause
    except ValueError as cause:
        raise error(where, f"expected JSON, found an error: {cause}", _RESTORE) from cause
    if not isinstance(value, dict):
        raise error(where, f"expected a JSON object, found {type(value).__name__}", _RESTORE)
    return value


def is_pointer(path: Path) -> bool:
    """Whether a file is what Git LFS leaves in place of one that was not fetched."""
    with path.open("rb") as file:
        return file.read(len(LFS_POINTER)) == LFS_POINTER


def read_object(path: Path, error: type[CheckpointError] = CheckpointError) -> dict[str, Any]:
    """Reads a file that holds one JSON object.

    Raises:
        CheckpointError: As `error`: the file cannot be read, is too large, or `parse_object` refuses it.
    """
    try:
        size = path.stat().st_size
        if size > MAX_FILE_BYTES:
            raise error(str(path), f"expected JSON of at most {MAX_FILE_BYTES} bytes, found {size}", _RESTORE)
        data = path.read_bytes()
    except OSError as cause:
        raise error(str(path), f"cannot be read: {cause.strerror}", "check the path and its permissions") from cause
    if data.startswith(LFS_POINTER):
        raise error(str(path), "expected JSON, found a Git LFS pointer to it", LFS_REMEDY)
    return parse_object(data, str(path), error)


def check_record(
    value: object,
    where: str,
    error: type[CheckpointError],
    remedy: str,
    keys: Sequence[str],
    optional: Sequence[str] = (),
) -> dict[str, Any]:
    """`value` as an object with all of `keys`, perhaps some of `optional`, and nothing else.

    Args:
        value: What was parsed.
        where: What to call it in an error.
        error: The class of errors raised.
        remedy: What the reader of an error can do.
        keys: Those that must be there.
        optional: Those that may be there.

    Raises:
        CheckpointError: As `error`: not an object, or a key is missing or unknown.
    """
    if not isinstance(value, Mapping):
        raise error(where, f"expected an object, found {type(value).__name__}", remedy)
    for key in keys:
        if key not in value:
            raise error(where, f"key {key!r} is missing", remedy)
    known = (*keys, *optional)
    for key in value:
        if key not in known:
            problem = f"unknown key {key!r} (known: {', '.join(known)})"
            raise error(where, problem, "remove it, or install the release that knows it")
    return dict(value)


def _no_key_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        twice, count = Counter(key for key, _ in pairs).most_common(1)[0]
        raise ValueError(f"key {twice!r} occurs {count} times")
    return value


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")
