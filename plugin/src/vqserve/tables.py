"""How commands print tables and bytes, and write their `--json`."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from vqserve.format.atomic import write_whole
from vqserve.format.errors import UsageError

PLAIN_WIDTH = 120
"""Columns of a table that does not go to a terminal."""


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


def check_writable(option: str, path: Path | None) -> None:
    """Checks that a file can be written, before the work whose result goes into it.

    Raises:
        UsageError: There is no such folder, or the path is one.
    """
    if path is not None and not path.parent.is_dir():
        raise UsageError(f"{option} {path}: there is no folder {path.parent}")
    if path is not None and path.is_dir():
        raise UsageError(f"{option} {path}: is a folder; name a file")


def write_json(path: Path, content: Any) -> None:
    """Writes what a command has found."""
    write_whole(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")
