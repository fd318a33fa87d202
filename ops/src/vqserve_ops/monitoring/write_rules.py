"""Writes the chart's rule file: `python -m vqserve_ops.monitoring.write_rules charts/vqserve/files/rules.yaml`."""

from __future__ import annotations

import sys
from pathlib import Path

from vqserve_ops.monitoring import alerts, slo
from vqserve_ops.monitoring.rules import Group, file_of


def main() -> None:
    """Writes to the path that is the only argument."""
    [path] = sys.argv[1:]
    Path(path).write_text(text(), encoding="utf-8")


def text() -> str:
    """What the file should hold."""
    return file_of(groups())


def groups() -> list[Group]:
    """All rules of a release."""
    return [*alerts.groups(), *slo.groups()]


if __name__ == "__main__":
    main()
