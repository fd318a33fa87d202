"""Dashboards as pictures: the panels that Grafana would show, from a Prometheus and without a Grafana."""

from __future__ import annotations

import io
import json
import math
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator
from PIL import Image

from monitoring.prometheus import NAMESPACE, RELEASE, Prometheus
from vqserve_ops.monitoring import queries
from vqserve_ops.monitoring.dashboards import Page
from vqserve_ops.monitoring.generate import generated
from vqserve_ops.monitoring.promql import filled_in

COLUMN, LINE = 0.5, 0.34
"""Inches of a cell of Grafana's grid."""
LEFT, RIGHT, ABOVE, BELOW = 0.62, 0.15, 0.32, 0.66
"""Inches of a panel around its axes, for numbers, title and legend."""
HEADING = 0.6
STEP_SECONDS, BUCKET_SECONDS, WINDOW = 1, 5, "10s"
"""Between two points, of a heatmap's column, and that rates are taken over."""
THRESHOLDS = {"ttft": "5.0", "tpot": "0.1", "e2e": "60.0"}
PALETTE = 96
FEW = 4
"""Series of a panel, beyond which those that are 0 all the time are left out."""
UNITS = {
    "s": "s", "percentunit": "%", "reqps": "requests/s", "short": "", "none": "", "suffix: tok/s": "tok/s",
    "suffix: tok": "tok", "suffix: /s": "per second",
}  # fmt: skip
"""Of Grafana's names those that these dashboards use, and how a title has them."""
PLAIN, MUTED = "#222222", "#777777"
COLOURS = ("#1f77b4", "#ff7f0e", "#2ca02c", "#d62728", "#9467bd", "#8c564b", "#e377c2", "#7f7f7f", "#bcbd22")

_BY_TEXT = {(query.expr, query.legend): query for query in queries.all_queries()}
Line = tuple[str, list[float]]
"""A series: its legend, and values every `STEP_SECONDS` from the start on."""


def draw(path: Path, page: Page, prometheus: Prometheus, start: float, end: float) -> list[str]:
    """Draws a dashboard.

    Args:
        path: Of a PNG, written anew.
        page: Which.
        prometheus: Is asked.
        start: In seconds since the epoch.
        end: The same.

    Returns:
        Titles of the panels for which there was nothing.
    """
    panels = json.loads(generated()[f"{page.name}.json"])["panels"]
    lines = max(panel["gridPos"]["y"] + panel["gridPos"]["h"] for panel in panels)
    width, height = 24 * COLUMN, lines * LINE + HEADING
    figure = Figure(figsize=(width, height), facecolor="white")
    FigureCanvasAgg(figure)
    empty = []
    for panel in panels:
        at = panel["gridPos"]
        left, top = at["x"] * COLUMN, height - HEADING - at["y"] * LINE
        if panel["type"] == "row":
            figure.text(0.1 / width, (top - 0.26) / height, panel["title"], fontsize=11, weight="bold", color=PLAIN)
            continue
        figure.text((left + 0.1) / width, (top - 0.2) / height, _title(panel), fontsize=9, color=PLAIN)
        right, bottom = left + at["w"] * COLUMN, top - at["h"] * LINE
        if panel["type"] == "stat":
            text = _now(panel, prometheus, end)
            shown = bool(text)
            middle = (left + right) / 2 / width, (top + bottom - 0.2) / 2 / height
            figure.text(*middle, text, fontsize=12, color=COLOURS[0], ha="center", va="center")
        else:
            wide, high = (right - left - LEFT - RIGHT) / width, (top - bottom - ABOVE - BELOW) / height
            axes = figure.add_axes(((left + LEFT) / width, (bottom + BELOW) / height, wide, high))
            kind = _heatmap if panel["type"] == "heatmap" else _lines
            shown = kind(axes, panel, prometheus, start, end)
        if not shown:
            empty.append(panel["title"])
            middle = (left + right + LEFT - RIGHT) / 2 / width, (top + bottom - ABOVE + BELOW) / 2 / height
            figure.text(*middle, "no data", fontsize=9, color=MUTED, ha="center", va="center")
    cores = len(os.sched_getaffinity(0))
    title = f"vqserve / {page.title}: the demo model on {cores} CPU cores; seconds since the load began"
    figure.text(0.1 / width, 1 - 0.32 / height, title, fontsize=12, color=PLAIN)
    path.parent.mkdir(parents=True, exist_ok=True)
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=100)
    with Image.open(drawn) as image:  # of few colours: a palette of them takes a third of the bytes
        image.convert("RGB").quantize(PALETTE).save(path, optimize=True)
    return empty


def _title(panel: dict[str, Any]) -> str:
    unit = _unit(panel)
    return f"{panel['title']}, {unit}" if unit and panel["type"] != "heatmap" else str(panel["title"])


def _unit(panel: dict[str, Any]) -> str:
    return UNITS[panel["fieldConfig"]["defaults"]["unit"]]


def _queries(panel: dict[str, Any]) -> list[queries.Query]:
    return [_BY_TEXT[target["expr"], target["legendFormat"]] for target in panel["targets"]]


def _asked(query: queries.Query, window: str = WINDOW) -> str:
    return queries.instant(query, window, namespace=NAMESPACE, release=RELEASE, **THRESHOLDS)


def _legend(query: queries.Query, labels: dict[str, str]) -> str:
    named = re.sub(r"\{\{(\w+)\}\}", lambda found: labels.get(found[1], ""), query.legend)
    return filled_in(named, THRESHOLDS)


def _now(panel: dict[str, Any], prometheus: Prometheus, end: float) -> str:
    """What a panel of single values says: names, or numbers."""
    [query] = _queries(panel)
    found = prometheus.samples(_asked(query), end)
    if panel["options"]["textMode"] == "name":
        return "\n".join(_legend(query, sample["metric"]) for sample in found)
    unit = _unit(panel)
    return "\n".join(f"{float(sample['value'][1]):.3g} {unit}".strip() for sample in found)


def _series(query: queries.Query, prometheus: Prometheus, start: float, end: float) -> list[Line]:
    """With NaN where there is nothing, so that no line is drawn across."""
    lines = []
    for sample in prometheus.over(_asked(query), start, end, STEP_SECONDS):
        there = {round(float(at) - start): float(value) for at, value in sample["values"]}
        values = [there.get(at, math.nan) for at in range(0, int(end - start) + 1, STEP_SECONDS)]
        if any(map(math.isfinite, values)):
            lines.append((_legend(query, sample["metric"]), values))
    return sorted(lines, key=lambda line: (int(re.split(r"\D", line[0])[0] or 0), line[0]))  # 2-3 before 16-31


def _lines(axes: Axes, panel: dict[str, Any], prometheus: Prometheus, start: float, end: float) -> bool:
    found = [line for query in _queries(panel) for line in _series(query, prometheus, start, end)]
    moving = [line for line in found if any(value > 0 for value in line[1])]
    shown = moving if moving and len(found) > FEW else found
    defaults = panel["fieldConfig"]["defaults"]
    if defaults["custom"]["stacking"]["mode"] == "normal":
        _stacked(axes, shown)
    else:
        for colour, (name, values) in zip(COLOURS * 3, shown, strict=False):
            times = range(0, len(values) * STEP_SECONDS, STEP_SECONDS)
            axes.plot(times, values, color=colour, linewidth=1.1, label=name)
    _plain(axes, end - start)
    axes.set_ylim(bottom=0, top=defaults.get("max"))
    if defaults["unit"] == "short":
        axes.yaxis.set_major_locator(MaxNLocator(4, integer=True))
    if defaults["unit"] == "percentunit":
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value * 100:g}"))
    if found:
        handles, names = axes.get_legend_handles_labels()
        room = axes.get_position().width * axes.get_figure().get_figwidth()  # type: ignore[union-attr]
        columns = _columns(names, room)
        axes.legend(
            handles, names, ncol=columns, fontsize=7, labelcolor=PLAIN, handlelength=1.2, columnspacing=1.2,
            loc="upper left", bbox_to_anchor=(-0.02, -0.13), borderaxespad=0.0, frameon=False,
        )  # fmt: skip
    return bool(found)


def _stacked(axes: Axes, found: Sequence[Line]) -> None:
    if found:
        heights = [[value if math.isfinite(value) else 0.0 for value in values] for _, values in found]
        times = range(0, len(heights[0]) * STEP_SECONDS, STEP_SECONDS)
        axes.stackplot(times, heights, labels=[name for name, _ in found], colors=COLOURS * 3, alpha=0.8, linewidth=0)


def _columns(names: Sequence[str], room: float) -> int:
    """As many as fit, at 7 points of type."""
    return max(1, min(len(names), int(room / (0.35 + 0.055 * max(map(len, names))))))


def _heatmap(axes: Axes, panel: dict[str, Any], prometheus: Prometheus, start: float, end: float) -> bool:
    [query] = _queries(panel)
    found = prometheus.over(_asked(query, f"{BUCKET_SECONDS}s"), start + BUCKET_SECONDS, end, BUCKET_SECONDS)
    grown = {float(sample["metric"]["le"]): dict(sample["values"]) for sample in found}
    bounds = sorted(bound for bound in grown if math.isfinite(bound))
    times = sorted({at for values in grown.values() for at in values})
    if not times or len(bounds) < 2:
        return False
    counts, below = [], dict.fromkeys(times, 0.0)
    for bound in bounds:
        now = {at: float(grown[bound].get(at, 0)) for at in times}
        counts.append([max(now[at] - below[at], 0.0) or math.nan for at in times])
        below = now
    edges = [at - start - BUCKET_SECONDS for at in times] + [times[-1] - start]
    mesh = axes.pcolormesh(edges, range(len(bounds) + 1), counts, cmap="Oranges", vmin=0, rasterized=True)
    bar = axes.figure.colorbar(mesh, ax=axes, pad=0.01, fraction=0.03)
    bar.outline.set_visible(False)
    bar.ax.tick_params(labelsize=7, length=0, labelcolor=MUTED)
    bar.ax.yaxis.set_major_locator(MaxNLocator(3, integer=True))
    _plain(axes, end - start)
    axes.grid(visible=False)
    share = panel["options"]["yAxis"]["unit"] == "percentunit"
    shown = range(0, len(bounds), max(1, len(bounds) // 6))
    axes.set_yticks(
        [at + 1 for at in shown], [f"{bounds[at] * 100:g} %" if share else f"{bounds[at]:g}" for at in shown]
    )
    axes.set_xlabel(f"colour: requests in {BUCKET_SECONDS} s", fontsize=7, color=MUTED, loc="left")
    return True


def _plain(axes: Axes, seconds: float) -> None:
    axes.set_xlim(0, seconds)
    axes.tick_params(labelsize=7, length=0, labelcolor=MUTED)
    axes.grid(color="#e6e6e6", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.yaxis.set_major_locator(MaxNLocator(4))
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color("#bbbbbb")
