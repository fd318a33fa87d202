"""The allocation of a checkpoint's experts to tiers as a picture. Needs matplotlib, the extra `plot`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from vqserve.format.config import PROJECTIONS
from vqserve.format.tiers import TIERS

_COLOURS = ("#c6dbef", "#6baed6", "#2171b5", "#08306b")
"""More bits, darker; told apart in print and by the colour-blind."""


def draw(path: Path, tiers: Mapping[int, Mapping[str, tuple[int, ...]]]) -> None:
    """Draws stacked bars, one per layer, one row of them per projection.

    Args:
        path: File to write; its suffix is the kind of picture.
        tiers: Per layer and projection, how many experts are in each of `TIERS`.
    """
    layers = list(tiers)
    figure = Figure(figsize=(max(6.0, 1.5 + 0.16 * len(layers)), 7.0), layout="constrained")
    FigureCanvasAgg(figure)
    rows = figure.subplots(len(PROJECTIONS), 1, sharex=True, sharey=True, squeeze=False)[:, 0]
    for axes, proj in zip(rows, PROJECTIONS, strict=True):
        below = [0] * len(layers)
        for at, (tier, colour) in enumerate(zip(TIERS.values(), _COLOURS, strict=True)):
            counts = [tiers[layer][proj][at] for layer in layers]
            label = f"{tier.id}: {tier.bits:g} bit" if axes is rows[0] else None
            axes.bar(layers, counts, bottom=below, width=0.9, color=colour, label=label)
            below = [low + count for low, count in zip(below, counts, strict=True)]
        axes.set_title(proj, loc="left", fontsize="medium")
        axes.set_ylabel("experts")
        axes.margins(x=0.01)
    rows[-1].set_xlabel("layer")
    rows[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.legend(loc="outside upper center", ncols=len(TIERS), frameon=False)
    # The same checkpoint, the same bytes.
    metadata = {"Date": None} if path.suffix.lower() == ".svg" else None
    with matplotlib.rc_context({"svg.hashsalt": "vqserve"}):
        figure.savefig(path, metadata=metadata, dpi=120)
