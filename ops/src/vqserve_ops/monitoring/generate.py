"""Writes the chart's dashboards: `python -m vqserve_ops.monitoring.generate charts/vqserve/files/dashboards`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from grafana_foundation_sdk.cog.encoder import JSONEncoder

from vqserve_ops.monitoring.dashboards import PAGES


def main() -> None:
    """Writes into the folder that is the only argument, and removes what is no dashboard any more."""
    [folder] = map(Path, sys.argv[1:])
    folder.mkdir(parents=True, exist_ok=True)
    made = generated()
    for path in folder.glob("*.json"):
        if path.name not in made:
            path.unlink()
    for name, text in made.items():
        (folder / name).write_text(text, encoding="utf-8")


def generated() -> dict[str, str]:
    """What each file should hold, by its name."""
    return {
        f"{page.name}.json": json.dumps(page.built(), cls=JSONEncoder, indent=1, sort_keys=True, ensure_ascii=False)
        + "\n"
        for page in PAGES
    }


if __name__ == "__main__":
    main()
