"""Two runs side by side: `python -m loadtest.compare build/loadtest/BEFORE build/loadtest/AFTER`.

Every difference has a bootstrap interval. Requests are drawn anew from each run, with all their gaps, because the gaps
of one answer are not independent; throughput is drawn in blocks of time. An interval around 1 is no finding.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from scipy.stats import bootstrap

from loadtest.plots import token_times
from loadtest.records import COMPARED, Outcome, Record, RecordError
from loadtest.report import whole
from loadtest.results import Results, title
from loadtest.slo import Slo, SloError

RESAMPLES, CONFIDENCE, SEED = 2000, 0.95, 0
BLOCKS = 20
"""Of time, that throughput is drawn in; at least `BLOCK_S` long, so that neighbours hardly depend on each other."""
BLOCK_S = 2.0
FEWEST = 8
"""Values of a run, below which no interval is stated."""

Array = np.ndarray[Any, np.dtype[np.float64]]


@dataclass(frozen=True)
class Measure:
    """Something that is compared.

    Attributes:
        name: What, with its unit.
        less_is_better: Of latencies.
        values: Of a run: an array per request or block, of which several are joined before `statistic` sees them.
        statistic: Of the joined values.
    """

    name: str
    less_is_better: bool
    values: Callable[[Results], list[Array]]
    statistic: Callable[[Array], float]


@dataclass(frozen=True)
class Difference:
    """One measure of both runs.

    Attributes:
        ratio: After / before.
        low: Lower end of the interval of the ratio; None of too few values.
        high: Upper end.
        verdict: `better`, `worse`, `no difference found`, `too few values`.
    """

    name: str
    before: float
    after: float
    ratio: float
    low: float | None
    high: float | None
    verdict: str


class CompareError(ValueError):
    """Two runs that cannot be compared; says why and what to do."""


def _answers(results: Results) -> list[Record]:
    return [record for record in results.records if record.outcome == Outcome.OK and not record.warm_up]


def _field(name: str) -> Callable[[Results], list[Array]]:
    def values(results: Results) -> list[Array]:
        found = [getattr(record, name) for record in _answers(results)]
        return [np.array([value]) for value in found if value is not None]

    return values


def _gaps(results: Results) -> list[Array]:
    return [np.array(record.gaps_s) for record in _answers(results) if record.gaps_s]


def _right(results: Results) -> list[Array]:
    return [np.array([float(r.correct)]) for r in _answers(results) if r.correct is not None]


def _good(results: Results) -> list[Array]:
    return [np.array([float(record.good)]) for record in results.records if not record.warm_up]


def _goodput(results: Results) -> list[Array]:
    slo = results.slo
    measured = [record for record in results.records if not record.warm_up]
    return [np.array([float(slo.met(record))]) for record in measured] if slo else []


def _tokens_per_s(results: Results) -> list[Array]:
    """Tokens per second of each block between the first request's start and the last one's."""
    measured = [record for record in results.records if not record.warm_up]
    if not measured:
        return []
    # Until the last start: while the last answers end, less and less is asked for.
    begin, end = measured[0].sent_at, measured[-1].sent_at
    blocks = min(BLOCKS, int((end - begin) / BLOCK_S))
    if blocks < 1:
        return []
    # The warm-up's answers flow into the first blocks, as the last ones flow out of the end.
    chunks = np.array([pair for record in results.records for pair in token_times(record)]).reshape(-1, 2)
    tokens, edges = np.histogram(chunks[:, 0], np.linspace(begin, end, blocks + 1), weights=chunks[:, 1])
    return [np.array([value]) for value in tokens / np.diff(edges)]


def _percentile(percent: float) -> Callable[[Array], float]:
    return lambda values: float(np.percentile(values, percent, method="inverted_cdf"))


def _mean(values: Array) -> float:
    return float(values.mean())


MEASURES = (
    *(
        Measure(f"{label} {name}, s", less_is_better=True, values=values, statistic=statistic)
        for label, values in (
            ("TTFT", _field("ttft_s")),
            ("first content", _field("first_content_s")),
            ("ITL", _gaps),
            ("TPOT", _field("tpot_s")),
            ("e2e", _field("e2e_s")),
        )
        for name, statistic in (
            ("mean", _mean),
            ("p50", _percentile(50)),
            ("p90", _percentile(90)),
            ("p99", _percentile(99)),
        )
    ),
    Measure("tokens per second in all", less_is_better=False, values=_tokens_per_s, statistic=_mean),
    Measure("share of good requests", less_is_better=False, values=_good, statistic=_mean),
    Measure("share that keeps the SLO", less_is_better=False, values=_goodput, statistic=_mean),
    Measure("share of right answers", less_is_better=False, values=_right, statistic=_mean),
)


def interval(
    before: Sequence[Array], after: Sequence[Array], statistic: Callable[[Array], float]
) -> tuple[float, float]:
    """The bootstrap interval of the ratio of a statistic, after / before, drawing whole arrays from each."""
    draw_before, draw_after = _drawing(before), _drawing(after)

    def ratio(chosen: Array, other: Array) -> float:
        below = statistic(draw_before(chosen))
        return statistic(draw_after(other)) / below if below else np.nan

    found = bootstrap(
        (np.arange(len(before)), np.arange(len(after))),
        ratio,
        n_resamples=RESAMPLES,
        vectorized=False,
        paired=False,
        confidence_level=CONFIDENCE,
        method="percentile",
        rng=np.random.default_rng(SEED),
    ).confidence_interval
    return float(found.low), float(found.high)


def _drawing(arrays: Sequence[Array]) -> Callable[[Array], Array]:
    if all(len(array) == 1 for array in arrays):
        joined = np.concatenate(arrays)
        return lambda chosen: joined[chosen.astype(np.intp)]
    return lambda chosen: np.concatenate([arrays[i] for i in chosen.astype(np.intp)])


def compare(before: Results, after: Results, *, allow: Sequence[str] = ()) -> list[Difference]:
    """All measures that both runs have.

    Raises:
        CompareError: The runs differ in what was asked, and that is not in `allow`.
    """
    for name in COMPARED:
        old, new = getattr(before.run, name), getattr(after.run, name)
        if old != new and name not in allow:
            what = _where(old, new) if name == "profile" else f"{old} and {new}"
            raise CompareError(
                f"the runs differ in `{name}`: {what}; compare runs of one configuration, or say --allow {name}"
            )
    found = []
    for measure in MEASURES:
        old, new = measure.values(before), measure.values(after)
        if old and new:
            found.append(_difference(measure, old, new))
    return found


def _difference(measure: Measure, old: Sequence[Array], new: Sequence[Array]) -> Difference:
    before, after = measure.statistic(np.concatenate(old)), measure.statistic(np.concatenate(new))
    ratio = after / before if before else float("nan")
    if min(len(old), len(new)) < FEWEST:
        return Difference(measure.name, before, after, ratio, None, None, "too few values")
    low, high = interval(old, new, measure.statistic)
    verdict = "no difference found"
    if high < 1 or low > 1:
        verdict = "better" if (high < 1) == measure.less_is_better else "worse"
    return Difference(measure.name, before, after, ratio, low, high, verdict)


def _where(old: Any, new: Any, path: str = "") -> str:
    """The first place in which two profiles differ."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in [*old, *new]:
            if old.get(key) != new.get(key):
                return _where(old.get(key), new.get(key), f"{path}.{key}" if path else str(key))
    return f"`{path}` is {json.dumps(old, ensure_ascii=False)} and {json.dumps(new, ensure_ascii=False)}"


def table(differences: Sequence[Difference]) -> str:
    """For a terminal."""
    width = max(len(d.name) for d in differences)
    lines = [f"{'':{width}}  {'before':>10}  {'after':>10}  {'ratio':>6}  {CONFIDENCE:.0%} interval"]
    for d in differences:
        span = "-" if d.low is None else f"{d.low:.3f} - {d.high:.3f}"
        lines.append(f"{d.name:{width}}  {d.before:10.4g}  {d.after:10.4g}  {d.ratio:6.3f}  {span:15}  {d.verdict}")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """0: nothing got worse; 1: something did; 2: the runs cannot be compared."""
    parser = argparse.ArgumentParser("loadtest.compare", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("before", type=Path, help="folder of a run")
    parser.add_argument("after", type=Path, help="folder of the other")
    parser.add_argument("--allow", action="append", default=[], choices=COMPARED, help="what may differ between them")
    parser.add_argument("--slo", help="compares goodput too; as of loadtest.report")
    parser.add_argument("--out", type=Path, help="folder for compare.html and compare.json; default: that of `after`")
    options = parser.parse_args(arguments)
    try:
        slo = Slo.parse(options.slo) if options.slo else None
        before, after = Results.read(options.before, slo), Results.read(options.after, slo)
        found = compare(before, after, allow=options.allow)
        if not found:
            raise CompareError("the runs have nothing in common that was measured")
        out = options.out or options.after
        page = Environment(loader=PackageLoader("loadtest", "templates"), undefined=StrictUndefined, autoescape=True)
        text = page.get_template("compare.html.jinja").render(
            before=title(before.run), after=title(after.run), differences=found, confidence=CONFIDENCE,
            warnings=[*before.warnings, *after.warnings], allowed=options.allow,
        )  # fmt: skip
        whole(out / "compare.html", lambda file: file.write(text))
        body = {"before": asdict(before.run), "after": asdict(after.run), "differences": [asdict(d) for d in found]}
        whole(out / "compare.json", lambda file: json.dump(body, file, ensure_ascii=False, indent=1))
    except (CompareError, RecordError, SloError, OSError) as error:
        sys.stderr.write(f"loadtest: error: {error}\n")
        return 2
    sys.stdout.write(f"{table(found)}\nreport: {out / 'compare.html'}\n")
    return int(any(d.verdict == "worse" for d in found))


if __name__ == "__main__":
    sys.exit(main())
