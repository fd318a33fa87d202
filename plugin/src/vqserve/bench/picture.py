"""The kernels' times as a picture: share of the copy bandwidth by batch. Needs matplotlib, the extra `plot`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure


def draw(path: Path, found: Mapping[str, Any]) -> None:
    """Draws a roofline: operations per byte against operations per second, one line per mix, one panel per sharing.

    Args:
        path: File to write; its suffix is the kind of picture.
        found: What `bench.kernels.measure` returned.
    """
    rows, copy = found["rows"], found["copy bytes per second"]
    ranks = sorted({row["ranks"] for row in rows})
    figure = Figure(figsize=(6.5 * len(ranks), 5.0), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(ranks), sharey=True, squeeze=False)[0]
    for axes, number in zip(panels, ranks, strict=True):
        mine = [row for row in rows if row["ranks"] == number]
        for name in dict.fromkeys(row["tiers"] for row in mine):
            line = [row for row in mine if row["tiers"] == name]
            intensity = [row["flops"] / row["nbytes"] for row in line]
            speed = [row["flops"] / row["us"] * 1e6 for row in line]
            axes.loglog(intensity, speed, marker="o", markersize=3, label=name)
        ends = [min(row["flops"] / row["nbytes"] for row in mine), max(row["flops"] / row["nbytes"] for row in mine)]
        axes.loglog(ends, [end * copy for end in ends], color="black", linestyle="--", label="copy bandwidth")
        axes.set_title(f"one rank of {number}" if number > 1 else "whole experts", loc="left")
        axes.set_xlabel("operations per byte of codes and scales")
    panels[0].set_ylabel("operations per second")
    panels[-1].legend(frameon=False)
    figure.suptitle(f"Routed experts of one GLM-5.2 layer on {found['machine']['gpu']}")
    figure.savefig(path, dpi=120)
