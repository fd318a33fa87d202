"""Reports of a run: `python -m loadtest.report build/loadtest/RUN --slo ttft_s=2,failures=0.01`.

Beside the records it writes `report.html` (numbers and plots, one file that needs no network), `report.json` (the same
numbers and the histograms), `groups.csv` (a row per group of requests) and `requests.csv` (a row per request).
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, TextIO

from jinja2 import Environment, PackageLoader, StrictUndefined

from loadtest.plots import plots
from loadtest.records import Record, RecordError
from loadtest.results import DISPATCH, Group, Results, title
from loadtest.slo import LATENCIES, Slo, SloError

HTML, JSON, GROUPS, REQUESTS = "report.html", "report.json", "groups.csv", "requests.csv"
TITLES = {**LATENCIES, DISPATCH: "dispatch lag"}
NOT_IN_CSV = ("gaps_s", "gap_tokens")
"""Lists; the records have them."""


def write(folder: Path, results: Results) -> Path:
    """Writes all reports of a run into its folder, each whole or not at all.

    Returns:
        The path of the page.
    """
    whole(folder / JSON, lambda file: json.dump(results.json(), file, ensure_ascii=False, indent=1))
    whole(folder / GROUPS, lambda file: _groups(file, results))
    whole(folder / REQUESTS, lambda file: _requests(file, results.records))
    whole(folder / HTML, lambda file: file.write(html(results)))
    return folder / HTML


def html(results: Results) -> str:
    """The page."""
    page = Environment(loader=PackageLoader("loadtest", "templates"), undefined=StrictUndefined, autoescape=True)
    page.filters.update(ms=_ms, count=lambda value: f"{value:,}", number=_number, mib=lambda b: f"{b / 2**20:,.0f}")
    sections = {"Stages": results.stages, "Kinds of prompts": results.kinds, "Languages": results.languages}
    return page.get_template("report.html.jinja").render(
        results=results,
        title=title(results.run),
        summary=summary(results),
        sections={name: groups for name, groups in sections.items() if len(groups) > 1},
        latencies=TITLES,
        plots=plots(results),
        profile=json.dumps(results.run.profile, ensure_ascii=False, indent=2),
        memory=results.json()["memory"],
    )


def summary(results: Results) -> list[str]:
    """The run in a few lines, as the terminal and the page have them."""
    lines = [f"warning: {warning}" for warning in results.warnings]
    if (total := results.total) is None:
        return lines
    ended = ", ".join(f"{count} {outcome}" for outcome, count in total.outcomes.items())
    lines.append(f"{total.requests} requests in {total.seconds:.1f} s ({results.warm_up} of warm-up left out): {ended}")
    speeds = [f"{total.requests_per_s:.2f} requests/s", f"{total.tokens_per_s:.1f} tok/s in all"]
    if total.stream_tokens_per_s:
        speeds.append(f"{total.stream_tokens_per_s:.1f} tok/s per stream (median)")
    if total.goodput_per_s is not None:
        speeds.append(f"goodput {total.goodput_per_s:.2f} requests/s ({total.goodput_share:.1%})")
    lines.append(", ".join(speeds))
    for name, latency in total.latencies.items():
        shown = ", ".join(f"p{p} {latency.percentiles[p] * 1e3:,.1f}" for p in ("50", "90", "99"))
        lines.append(f"{TITLES[name]}: mean {latency.mean * 1e3:,.1f} ms, {shown}, most {latency.most * 1e3:,.1f}")
    if total.judged:
        lines.append(f"{total.correct} of {total.judged} answers right ({total.correct / total.judged:.1%})")
    if results.slo:
        lines.append(f"SLO {results.slo}: {results.verdict}")
    return lines


def _groups(file: TextIO, results: Results) -> None:
    plain = [f.name for f in fields(Group) if f.name not in ("outcomes", "latencies")]
    outcomes = sorted({outcome for group in _all(results) for outcome in group[1].outcomes})
    percentiles = ("mean", "50", "90", "95", "99", "99.9", "max")
    header = ["of", *plain, *outcomes, *(f"{name}_{p}" for name in TITLES for p in percentiles)]
    rows = csv.writer(file)
    rows.writerow(header)
    for of, group in _all(results):
        row: list[Any] = [of, *(getattr(group, name) for name in plain), *(group.outcomes.get(o, 0) for o in outcomes)]
        for name in TITLES:
            latency = group.latencies.get(name)
            values = latency and {"mean": latency.mean, "max": latency.most, **latency.percentiles}
            row += [values[p] if values else None for p in percentiles]
        rows.writerow(row)


def _all(results: Results) -> list[tuple[str, Group]]:
    named = {"stage": results.stages, "kind": results.kinds, "language": results.languages}
    total = [("total", results.total)] if results.total else []
    return [*total, *((of, group) for of, groups in named.items() for group in groups)]


def _requests(file: TextIO, records: Iterable[Record]) -> None:
    names = [field.name for field in fields(Record) if field.name not in NOT_IN_CSV]
    rows = csv.DictWriter(file, names, extrasaction="ignore")
    rows.writeheader()
    rows.writerows(asdict(record) for record in records)


def whole(path: Path, fill: Callable[[TextIO], Any]) -> None:
    """Writes a file whole or not at all; `fill` gets it open."""
    part = path.with_name(f".{path.name}.part")
    with part.open("w", encoding="utf-8", newline="") as file:
        fill(file)
    part.replace(path)


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:,.1f}"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:,.2f}"


def main(arguments: list[str] | None = None) -> int:
    """0: kept what was asked; 1: did not; 2: there is nothing to report."""
    parser = argparse.ArgumentParser("loadtest.report", description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("folder", type=Path, help="of a run, with its records-*.jsonl")
    parser.add_argument("--slo", help="what to judge by, e.g. ttft_s=2,failures=0.01; default: as the run was")
    options = parser.parse_args(arguments)
    try:
        results = Results.read(options.folder, Slo.parse(options.slo) if options.slo else None)
        page = write(options.folder, results)
    except (RecordError, SloError, OSError) as error:
        sys.stderr.write(f"loadtest: error: {error}\n")
        return 2
    sys.stdout.write("\n".join([*summary(results), f"report: {page}", ""]))
    return int(results.failed)


if __name__ == "__main__":
    sys.exit(main())
