"""Writes the chart's rules and dashboards: `python -m vqserve_ops.monitoring.generate charts/vqserve/files`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from grafana_foundation_sdk.cog.encoder import JSONEncoder

from vqserve_ops.monitoring import alerts, slo
from vqserve_ops.monitoring.dashboards import PAGES
from vqserve_ops.monitoring.rules import Group, file_of


def main() -> None:
    """Writes into the folder that is the only argument, and removes what is no dashboard any more."""
    [files] = map(Path, sys.argv[1:])
    (files / "rules.yaml").write_text(rules(), encoding="utf-8")
    folder, made = files / "dashboards", generated()
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.glob("*.json"):
        if path.name not in made:
            path.unlink()
    for name, text in made.items():
        (folder / name).write_text(text, encoding="utf-8")


def groups() -> list[Group]:
    """All rules of a release."""
    return [*alerts.groups(), *slo.groups()]


def rules() -> str:
    """What the rule file should hold."""
    return file_of(groups())


def generated() -> dict[str, str]:
    """What each dashboard's file should hold, by its name."""
    return {
        f"{page.name}.json": json.dumps(page.built(), cls=JSONEncoder, indent=1, sort_keys=True, ensure_ascii=False)
        + "\n"
        for page in PAGES
    }


if __name__ == "__main__":
    main()
