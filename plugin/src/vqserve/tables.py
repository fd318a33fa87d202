"""How commands print tables and bytes, and write their `--json`."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from vqserve.format.atomic import write_whole
from vqserve.format.errors import UsageError
from vqserve.format.manifest import MANIFEST

PLAIN_WIDTH = 120
"""Columns of a table that does not go to a terminal."""
PICTURES = (".png", ".svg")
"""What the name of a picture ends in."""


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], names: int = 1) -> None:
    """Prints a table, the first `names` columns to the left and the others to the right."""
    console = Console(width=None if sys.stdout.isatty() else PLAIN_WIDTH, markup=False, highlight=False)
    console.print(title)  # a title of the table's own would be broken to its width
    table = Table()
    for at, column in enumerate(columns):
        table.add_column(column, no_wrap=True, justify="left" if at < names else "right")
    for row in rows:
        table.add_row(*row)
    console.print(table)


def gib(size: int) -> str:
    """Bytes in GiB, or in the smaller unit that shows something of them."""
    for unit, name in ((1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")):
        if abs(size) >= unit:
            return f"{size / unit:,.2f} {name}"
    return f"{size} B"


def check_targets(targets: Mapping[str, Path | None], inputs: Iterable[Path | None]) -> None:
    """Checks that files can be written without harm to another, before the work whose results go into them.

    Args:
        targets: The files by option; those left out are None.
        inputs: Files and folders that the command reads.

    Raises:
        UsageError: There is no such folder, the path is no regular file, or it belongs to what is read, to a checkpoint
            or to another option.
    """
    taken: dict[Path, str] = {}
    for option, path in targets.items():
        if path is None:
            continue
        where = f"{option} {path}"
        _check_writable(where, path)
        place = path.resolve()
        for given in inputs:
            if given is not None and given.is_dir() and place.is_relative_to(given.resolve()):
                raise UsageError(f"{where}: would be a surplus file of the checkpoint; write it somewhere else")
            if given is not None and path.exists() and given.exists() and path.samefile(given):
                raise UsageError(f"{where}: is what the command reads; name another file")
        if any(all((folder / name).is_file() for name in ("config.json", MANIFEST)) for folder in place.parents):
            raise UsageError(f"{where}: would be a surplus file of the checkpoint; write it somewhere else")
        if place in taken:
            raise UsageError(f"{where}: is the file of {taken[place]} too; name another one")
        taken[place] = option


def _check_writable(where: str, path: Path) -> None:
    if path.is_symlink():
        raise UsageError(f"{where}: is a link, which would be replaced; name the file that it leads to")
    if path.is_dir():
        raise UsageError(f"{where}: is a folder; name a file")
    if path.exists() and not path.is_file():
        raise UsageError(f"{where}: is no regular file and would be replaced by one; name a file")
    if not path.parent.is_dir():
        raise UsageError(f"{where}: there is no folder {path.parent}; make it, or name a file elsewhere")
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise UsageError(f"{where}: {path.parent} is not yours to write to; name a file elsewhere")


def check_picture(path: Path) -> None:
    """Checks that a picture of this name can be drawn.

    Raises:
        UsageError: It cannot: another suffix, or no matplotlib.
    """
    if path.suffix.lower() not in PICTURES:
        raise UsageError(f"--plot {path}: expected a name that ends in {' or '.join(PICTURES)}")
    try:
        import matplotlib  # noqa: F401 - only whether it is there
    except ModuleNotFoundError as cause:
        raise UsageError("--plot: matplotlib is not installed; install vqserve[plot]") from cause


def write_json(path: Path, content: Any) -> None:
    """Writes what a command has found; of names that are no Unicode, half a character becomes JSON's escape for it."""
    text = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
    write_whole(path, text.encode("utf-8", "backslashreplace").decode("utf-8"))
