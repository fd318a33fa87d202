"""The small encode that tests of the whole encoder share: its command line, its files, its refusals."""

from __future__ import annotations

from pathlib import Path

import pytest

from vqserve import cli
from vqserve.format.manifest import sha256_file

FILE_SIZE = 2**20


def digests(folder: Path) -> dict[str, str]:
    return {path.name: sha256_file(path) for path in folder.iterdir() if path.is_file()}


def arguments(src: Path, dst: Path, calibration: Path, *more: str) -> list[str]:
    return ["encode", str(src), str(dst), "--bits", "2.0", "--calibration", str(calibration), "--quiet", *more]


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line that `vqserve` gives for bad input."""
    assert cli.main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    return line
