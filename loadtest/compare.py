"""Two runs side by side: `python -m loadtest.compare build/loadtest/BEFORE build/loadtest/AFTER`.

Every difference has a bootstrap interval. Requests are drawn anew from each run, with all their gaps, because the gaps
of one answer are not independent; throughput is drawn in blocks of time. Among many measures some differ by chance: the
verdicts, and with them the exit code, are corrected for their number (Holm), the intervals are each for itself.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined

from loadtest.plots import token_times
from loadtest.records import COMPARED, Outcome, Record, RecordError
from loadtest.report import whole
from loadtest.results import Results, title
from loadtest.slo import Slo, SloError

RESAMPLES, CONFIDENCE, SEED = 2000, 0.95, 0
BLOCKS = 20
"""Of time, that throughput is drawn in, and below which it is not judged."""
BLOCK_S, BLOCK_ANSWERS = 2.0, 4
"""The shortest block, and in mean answers: in a closed loop neighbours share answers, and depend on each other."""
FEWEST = 30
"""Requests of a run, below which no interval is stated: of 8, equal means differ 10 to 15 times in 100 instead of 5."""
BEYOND = 10
"""Requests that a run has to have on either side of a percentile: of fewer it is the luck of some. Their gaps count for
nothing here, as those of one answer may all be long."""
CACHED_APART = 0.05
"""Shares of prompt tokens from the prefix cache that differ by more make latencies of two runs different things."""

Array = np.ndarray[Any, np.dtype[np.float64]]
Draw = np.ndarray[Any, np.dtype[np.int64]]


@dataclass(frozen=True)
class Measure:
    """Something that is compared.

    Attributes:
        name: What, with its unit.
        less_is_better: Of latencies.
        values: Of a run: an array per request or block, of which several are joined before `statistic` sees them.
        statistic: Of the joined values.
        fewest: Requests or blocks that each run has to have.
    """

    name: str
    less_is_better: bool
    values: Callable[[Results], list[Array]]
    statistic: Callable[[Array], float]
    fewest: int = FEWEST


@dataclass(frozen=True)
class Difference:
    """One measure of both runs.

    Attributes:
        ratio: After / before; None if that is no number: before is 0.
        low: Lower end of the interval of the ratio; None of too few values, and if it is no number.
        high: Upper end, likewise.
        p: Chance of a difference like this between equals, corrected for the number of measures; None: too few values.
        verdict: `better`, `worse`, `no difference found`, `too few values`.
    """

    name: str
    before: float
    after: float
    ratio: float | None
    low: float | None
    high: float | None
    p: float | None
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
    if end - begin < BLOCK_S:
        return []
    answer_s = float(np.mean([record.e2e_s for record in _answers(results)] or [0.0]))
    blocks = max(1, min(BLOCKS, int((end - begin) / max(BLOCK_S, BLOCK_ANSWERS * answer_s))))
    # The warm-up's answers flow into the first blocks, as the last ones flow out of the end.
    chunks = np.array([pair for record in results.records for pair in token_times(record)]).reshape(-1, 2)
    tokens, edges = np.histogram(chunks[:, 0], np.linspace(begin, end, blocks + 1), weights=chunks[:, 1])
    return [np.array([value]) for value in tokens / np.diff(edges)]


def _percentile(percent: int) -> Callable[[Array], float]:
    return lambda values: float(np.percentile(values, percent, method="inverted_cdf"))


def _fewest(percent: int) -> int:
    return max(FEWEST, math.ceil(100 * BEYOND / min(percent, 100 - percent)))


def _mean(values: Array) -> float:
    return float(values.mean())


MEASURES = (
    *(
        Measure(f"{label} {name}, s", less_is_better=True, values=values, statistic=statistic, fewest=fewest)
        for label, values in (
            ("TTFT", _field("ttft_s")),
            ("first content", _field("first_content_s")),
            ("ITL", _gaps),
            ("TPOT", _field("tpot_s")),
            ("e2e", _field("e2e_s")),
        )
        for name, statistic, fewest in (
            ("mean", _mean, FEWEST),
            *((f"p{percent}", _percentile(percent), _fewest(percent)) for percent in (50, 90, 99)),
        )
    ),
    Measure("tokens per second in all", less_is_better=False, values=_tokens_per_s, statistic=_mean, fewest=BLOCKS),
    Measure("share of good requests", less_is_better=False, values=_good, statistic=_mean),
    Measure("share that keeps the SLO", less_is_better=False, values=_goodput, statistic=_mean),
    Measure("share of right answers", less_is_better=False, values=_right, statistic=_mean),
)


def ratios(before: Sequence[Array], after: Sequence[Array], statistic: Callable[[Array], float]) -> Array:
    """The bootstrap distribution of the ratio of a statistic, after / before, drawing whole arrays from each."""
    rng = np.random.default_rng(SEED)
    draw_before, draw_after = _drawing(before), _drawing(after)

    def drawn() -> float:
        below = statistic(draw_before(rng.integers(len(before), size=len(before))))
        above = statistic(draw_after(rng.integers(len(after), size=len(after))))
        return _ratio(below, above)

    return np.array([drawn() for _ in range(RESAMPLES)])


def interval(found: Array) -> tuple[float, float]:
    """The interval of a bootstrap distribution, whose ends may be infinite."""
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(found, (tail, 1 - tail), method="inverted_cdf")
    return float(low), float(high)


def chance(found: Array) -> float:
    """How often the ratio of a bootstrap distribution lies on the other side of 1, for either side."""
    return min(1.0, 2 * (1 + min(int((found <= 1).sum()), int((found >= 1).sum()))) / (1 + len(found)))


def corrected(chances: Sequence[float]) -> list[float]:
    """Holm's correction: with it the chance that any of so many equals is called different is the level at most."""
    found, worst = [0.0] * len(chances), 0.0
    for rank, index in enumerate(sorted(range(len(chances)), key=chances.__getitem__)):
        worst = max(worst, min(1.0, chances[index] * (len(chances) - rank)))
        found[index] = worst
    return found


def _ratio(before: float, after: float) -> float:
    if before:
        return after / before
    return math.inf if after else 1.0


def _drawing(arrays: Sequence[Array]) -> Callable[[Draw], Array]:
    if all(len(array) == 1 for array in arrays):
        joined = np.concatenate(arrays)
        return lambda chosen: joined[chosen]
    return lambda chosen: np.concatenate([arrays[i] for i in chosen])


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
    shared = [(m, old, new) for m in MEASURES if (old := m.values(before)) and (new := m.values(after))]
    draws = {m.name: ratios(old, new, m.statistic) for m, old, new in shared if min(len(old), len(new)) >= m.fewest}
    chances = dict(zip(draws, corrected([chance(found) for found in draws.values()]), strict=True))
    return [_difference(m, old, new, draws.get(m.name), chances.get(m.name)) for m, old, new in shared]


def _difference(
    measure: Measure, old: Sequence[Array], new: Sequence[Array], found: Array | None, p: float | None
) -> Difference:
    before, after = measure.statistic(np.concatenate(old)), measure.statistic(np.concatenate(new))
    ratio = _ratio(before, after)
    low, high, verdict = math.inf, math.inf, "too few values"
    if found is not None and p is not None:
        (low, high), verdict = interval(found), "no difference found"
        if p < 1 - CONFIDENCE:
            verdict = "better" if (ratio < 1) == measure.less_is_better else "worse"
    return Difference(measure.name, before, after, _finite(ratio), _finite(low), _finite(high), p, verdict)


def _finite(value: float) -> float | None:
    # JSON knows no infinity.
    return value if math.isfinite(value) else None


def cached_share(results: Results) -> float | None:
    """Of the answers' prompt tokens, how many came from the prefix cache: as they say, or the server's metrics."""
    said = [
        (r.cached_tokens, r.prompt_tokens) for r in _answers(results) if r.cached_tokens is not None and r.prompt_tokens
    ]
    if said:
        return sum(cached for cached, _ in said) / sum(prompt for _, prompt in said)
    seen = [s.values for s in results.samples if s.of == "server" and "prefix_cache_queried_tokens" in s.values]
    if not seen:
        return None
    asked, hit = (
        seen[-1].get(name, 0.0) - seen[0].get(name, 0.0)
        for name in ("prefix_cache_queried_tokens", "prefix_cache_hit_tokens")
    )
    return hit / asked if asked > 0 else None


def _cache_warnings(before: Results, after: Results) -> list[str]:
    old, new = cached_share(before), cached_share(after)
    if old is None or new is None or abs(old - new) <= CACHED_APART:
        return []
    return [
        f"the prefix cache held {old:.0%} of the prompt tokens before and {new:.0%} after: latencies differ by that"
        " too; begin both runs with an empty cache, or warm both up alike"
    ]


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
        span = "-" if d.p is None else f"{shown(d.low)} - {shown(d.high)}"
        lines.append(
            f"{d.name:{width}}  {d.before:10.4g}  {d.after:10.4g}  {shown(d.ratio):>6}  {span:15}  {d.verdict}"
        )
    return "\n".join([*lines, f"{CONFIDENCE:.0%} intervals are each for itself, verdicts for all measures together"])


def shown(ratio: float | None) -> str:
    """A ratio to three digits."""
    return "inf" if ratio is None else f"{ratio:.3f}"


def main(arguments: list[str] | None = None) -> int:
    """0: nothing got worse beyond chance; 1: something did; 2: the runs cannot be compared."""
    parser = argparse.ArgumentParser("loadtest.compare", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("before", type=Path, help="folder of a run")
    parser.add_argument("after", type=Path, help="folder of the other")
    parser.add_argument("--allow", action="append", default=[], choices=COMPARED, help="what may differ between them")
    parser.add_argument("--slo", help="what goodput counts; default: what `after` was judged by")
    parser.add_argument("--out", type=Path, help="folder for compare.html and compare.json; default: that of `after`")
    options = parser.parse_args(arguments)
    try:
        slo = Slo.parse(options.slo) if options.slo else None
        after = Results.read(options.after, slo)
        before = Results.read(options.before, after.slo)
        found = compare(before, after, allow=options.allow)
        if not found:
            raise CompareError("the runs have nothing in common that was measured")
        warnings = [*_cache_warnings(before, after), *before.warnings, *after.warnings]
        out = options.out or options.after
        page = Environment(loader=PackageLoader("loadtest", "templates"), undefined=StrictUndefined, autoescape=True)
        text = page.get_template("compare.html.jinja").render(
            before=title(before.run), after=title(after.run), differences=found, confidence=CONFIDENCE,
            warnings=warnings, allowed=options.allow, shown=shown,
        )  # fmt: skip
        whole(out / "compare.html", lambda file: file.write(text))
        body = {"before": asdict(before.run), "after": asdict(after.run), "differences": [asdict(d) for d in found]}
        body["warnings"] = warnings
        whole(out / "compare.json", lambda file: json.dump(body, file, ensure_ascii=False, indent=1))
    except (CompareError, RecordError, SloError, OSError) as error:
        sys.stderr.write(f"loadtest: error: {error}\n")
        return 2
    warned = [f"warning: {warning}" for warning in warnings]
    sys.stdout.write("\n".join([*warned, table(found), f"report: {out / 'compare.html'}", ""]))
    return int(any(d.verdict == "worse" for d in found))


if __name__ == "__main__":
    sys.exit(main())
