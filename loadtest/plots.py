"""What a run looked like, as SVG for a page."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter

from loadtest.distribution import Distribution
from loadtest.records import Outcome, Record, Sample
from loadtest.results import Results
from loadtest.slo import LATENCIES

SIZE = (7.6, 3.1)
"""Inches."""
POINTS = 4000
"""Most points of a plot: of more, every so-manieth is drawn."""
BINS = 200
"""Most bins of time."""
SHOWN = (50, 75, 90, 95, 99, 99.9)
GREY = "#999999"


def plots(results: Results) -> dict[str, str]:
    """Titles, and what belongs under them as SVG; a plot that would be empty is left out."""
    made: dict[str, Callable[[Axes, Results], bool]] = {
        "Tokens per second, and requests under way": _throughput,
        "Time to first token, and failures": _first_tokens,
        "Latencies by percentile": _percentiles,
        "Time to first token by length of the prompt": _lengths,
        "Stages": _stages,
        "The server's own account": _server,
        "Memory": _memory,
    }
    found = {}
    for title, draw in made.items():
        # Text stays text: it can be read and searched, and a page of plots stays small.
        with rc_context({"svg.fonttype": "none", "svg.hashsalt": title, "font.size": 8.5, "font.family": "sans-serif"}):
            figure = Figure(figsize=SIZE, layout="constrained")
            axes = figure.add_subplot()
            if draw(axes, results):
                axes.spines[["top", "right"]].set_visible(False)
                found[title] = _svg(figure, title)
    return found


def _svg(figure: Figure, title: str) -> str:
    out = io.StringIO()
    FigureCanvasSVG(figure)
    figure.savefig(out, format="svg", metadata={"Date": None})
    svg = out.getvalue()
    svg = re.sub(r'width="[0-9.]+pt" height="[0-9.]+pt"', f'role="img" aria-label="{title}"', svg, count=1)
    # Names within a picture: several stand in one page.
    prefix = re.sub(r"[^a-z]+", "-", title.lower())
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{prefix}-", svg)
    return svg[svg.index("<svg") :]


def token_times(record: Record) -> Iterator[tuple[float, float]]:
    """Unix time and tokens of each chunk with text; without counts, tokens are spread evenly."""
    if record.ttft_s is None or not record.completion_tokens:
        return
    at, total = record.sent_at + record.ttft_s, record.completion_tokens
    counts: Sequence[float] = record.gap_tokens or [total / (len(record.gaps_s) + 1)] * len(record.gaps_s)
    yield at, max(0.0, total - sum(counts))
    for gap, tokens in zip(record.gaps_s, counts, strict=True):
        at += gap
        yield at, tokens


def _begin(results: Results) -> float:
    return results.records[0].sent_at if results.records else results.run.started_at


def _throughput(axes: Axes, results: Results) -> bool:
    if not results.records:
        return False
    begin = _begin(results)
    end = max(record.sent_at + record.e2e_s for record in results.records)
    width = max(1.0, math.ceil((end - begin) / BINS))
    edges = np.arange(0, end - begin + width, width)
    chunks = np.array([pair for record in results.records for pair in token_times(record)]).reshape(-1, 2)
    tokens, _ = np.histogram(chunks[:, 0] - begin, edges, weights=chunks[:, 1])
    axes.stairs(tokens / width, edges, color="#1f77b4", label="tok/s")
    axes.set_ylabel("tokens per second")
    axes.set_ylim(bottom=0)
    other = axes.twinx()
    sent = [record for record in results.records if record.outcome != Outcome.NOT_SENT]
    starts = np.sort([record.sent_at for record in sent]) - begin
    ends = np.sort([record.sent_at + record.e2e_s for record in sent]) - begin
    moments = edges[:-1] + width / 2
    under_way = np.searchsorted(starts, moments, "right") - np.searchsorted(ends, moments, "right")
    other.plot(moments, under_way, color="#ff7f0e", linewidth=1, label="under way")
    other.set_ylabel("requests under way")
    other.set_ylim(bottom=0)
    other.spines[["top"]].set_visible(False)
    _time(axes, results)
    _legend(axes, other)
    return True


def _first_tokens(axes: Axes, results: Results) -> bool:
    begin, drawn = _begin(results), False
    kinds = dict.fromkeys(record.kind for record in results.records)
    for kind in sorted(kinds):
        found = [r for r in results.records if r.kind == kind and r.ttft_s is not None and r.good]
        drawn |= _scatter(axes, [(r.sent_at - begin, r.ttft_s or 0.0) for r in found], kind)
    bad = [record for record in results.records if not record.good]
    for outcome in sorted({record.outcome for record in bad}):
        points = [(r.sent_at - begin, max(r.e2e_s, 1e-3)) for r in bad if r.outcome == outcome]
        drawn |= _scatter(axes, points, f"{outcome} (when it ended)", marker="x")
    axes.set_yscale("log")
    axes.set_ylabel("seconds")
    _time(axes, results)
    _legend(axes)
    return drawn


def _percentiles(axes: Axes, results: Results) -> bool:
    answers = [record for record in results.records if record.outcome == Outcome.OK and not record.warm_up]
    drawn = False
    for name, label in LATENCIES.items():
        values = [v for r in answers for v in (r.gaps_s if name == "itl_s" else [getattr(r, name)]) if v is not None]
        if len(values) < 2 or max(values) <= 0:
            continue
        # As far as there are values: of 100 values the 99.9th percentile is the largest.
        found, last = Distribution(values), 1 - 1 / len(values)
        shares = 1 - np.logspace(math.log10(0.9), math.log10(1 - last), 120)
        axes.plot(1 / (1 - shares), [found.percentile(100 * share) for share in shares], label=label, linewidth=1.2)
        drawn = True
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.xaxis.set_major_locator(FixedLocator([1 / (1 - p / 100) for p in SHOWN]))
    axes.xaxis.set_minor_locator(FixedLocator([]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"p{100 * (1 - 1 / x):.4g}"))
    axes.set_ylabel("seconds")
    axes.grid(visible=True, alpha=0.25)
    _legend(axes)
    return drawn


def _lengths(axes: Axes, results: Results) -> bool:
    found = [r for r in results.records if r.outcome == Outcome.OK and r.prompt_tokens and r.ttft_s and not r.warm_up]
    if not found or max(r.prompt_tokens or 0 for r in found) < 4 * min(r.prompt_tokens or 0 for r in found):
        return False
    cold = [(float(r.prompt_tokens or 0), r.ttft_s or 0.0) for r in found if not r.cached_tokens]
    warm = [(float(r.prompt_tokens or 0), r.ttft_s or 0.0) for r in found if r.cached_tokens]
    _scatter(axes, cold, "nothing cached")
    _scatter(axes, warm, "some of it cached")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    axes.set_xlabel("tokens of the prompt")
    axes.set_ylabel("seconds")
    _legend(axes)
    return True


def _stages(axes: Axes, results: Results) -> bool:
    if len(results.stages) < 2:
        return False
    names = [group.name for group in results.stages]
    axes.plot(names, [group.tokens_per_s for group in results.stages], "o-", color="#1f77b4", label="tok/s")
    axes.set_ylabel("tokens per second")
    axes.set_ylim(bottom=0)
    other = axes.twinx()
    for percent, style in (("50", ":"), ("90", "--")):
        ttft = [
            g.latencies["ttft_s"].percentiles[percent] if "ttft_s" in g.latencies else math.nan for g in results.stages
        ]
        other.plot(names, ttft, f"s{style}", color="#ff7f0e", markersize=3, label=f"TTFT p{percent}")
    other.set_ylabel("seconds")
    other.set_ylim(bottom=0)
    axes.tick_params("x", rotation=30 if len(names) > 4 else 0)
    _legend(axes, other)
    return True


def _server(axes: Axes, results: Results) -> bool:
    found = [sample for sample in results.samples if sample.of == "server"]
    drawn = False
    for name, label in (("running", "running"), ("waiting", "waiting")):
        drawn |= _line(axes, results, found, name, label)
    axes.set_ylabel("requests")
    axes.set_ylim(bottom=0)
    other = axes.twinx()
    _line(other, results, found, "kv_cache_share", "KV cache in use", scale=100, color="#2ca02c")
    other.set_ylabel("%")
    other.set_ylim(0, 100)
    _time(axes, results)
    _legend(axes, other)
    return drawn


def _memory(axes: Axes, results: Results) -> bool:
    drawn = False
    for of, label in (("client", "client"), ("server", "server (its API process)"), ("process", "watched process")):
        samples = [sample for sample in results.samples if sample.of == of]
        drawn |= _line(axes, results, samples, "resident_bytes", label, scale=2**-20)
    axes.set_ylabel("MiB resident")
    axes.set_ylim(bottom=0)
    _time(axes, results)
    _legend(axes)
    return drawn


def _line(
    axes: Axes,
    results: Results,
    samples: Sequence[Sample],
    name: str,
    label: str,
    *,
    scale: float = 1.0,
    color: str | None = None,
) -> bool:
    points = [(sample.at - _begin(results), sample.values[name] * scale) for sample in samples if name in sample.values]
    if points:
        axes.plot(*zip(*points, strict=True), label=label, linewidth=1.2, color=color)
    return bool(points)


def _scatter(axes: Axes, points: Sequence[tuple[float, float]], label: str, marker: str = ".") -> bool:
    if points:
        few = points[:: math.ceil(len(points) / POINTS)]
        axes.plot(*zip(*few, strict=True), marker, markersize=3, linestyle="", label=label)
    return bool(points)


def _time(axes: Axes, results: Results) -> None:
    """Seconds as x, the warm-up shaded and a line where a stage begins."""
    begin = _begin(results)
    axes.set_xlabel("seconds")
    axes.set_xlim(left=0)
    stage = None
    for record in results.records:
        if record.stage != stage:
            if stage is not None:
                axes.axvline(record.sent_at - begin, color=GREY, linewidth=0.6, linestyle=":")
            stage = record.stage
    if any(record.warm_up for record in results.records) and not results.records[-1].warm_up:
        last = next(record for record in results.records if not record.warm_up)
        if results.records[0].warm_up:
            axes.axvspan(0, last.sent_at - begin, color=GREY, alpha=0.15, linewidth=0)


def _legend(axes: Axes, other: Axes | None = None) -> None:
    handles, labels = axes.get_legend_handles_labels()
    if other:
        more, names = other.get_legend_handles_labels()
        handles, labels = [*handles, *more], [*labels, *names]
    if handles:
        axes.legend(handles, labels, loc="best", frameon=False, ncols=2)
