"""The numbers of a run: what a report shows and two runs are compared by, from what its processes wrote down."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from loadtest.distribution import Distribution
from loadtest.records import Log, Outcome, Record, Run, Sample, read_all
from loadtest.slo import LATENCIES, Slo

VERSION = 1
"""Of the JSON. Fields are only ever added within a version."""
PERCENTILES = (50, 90, 95, 99, 99.9)
DISPATCH = "dispatch_lag_s"
LAG_S = 0.005
"""A process that keeps ready greenlets waiting longer than this, for one request in ten, measures itself."""
CPU_SHARE = 0.9
"""Of one core: a Python process has no more."""


@dataclass(frozen=True)
class Latency:
    """One kind of latency over some requests, in seconds.

    Attributes:
        count: Values that there are.
        percentiles: By their number, e.g. `99.9`.
        histogram: `Distribution.encoded`.
    """

    count: int
    mean: float
    most: float
    percentiles: dict[str, float]
    histogram: str

    @classmethod
    def of(cls, values: Iterable[float]) -> Latency | None:
        """None of no values."""
        found = Distribution(values)
        if not found:
            return None
        percentiles = {f"{p:g}": found.percentile(p) for p in PERCENTILES}
        return cls(len(found), found.mean, found.most, percentiles, found.encoded())


@dataclass(frozen=True)
class Group:
    """The results of some of the requests: all, a stage's, a kind's, a language's.

    Attributes:
        name: Which.
        seconds: From the first request's start to the last one's end.
        requests: Sent, or due and not sent.
        good: Ended as they should.
        outcomes: How many requests ended how.
        requests_per_s: Good ones per second.
        goodput_per_s: Requests per second that keep the SLO each by itself; None without one.
        goodput_share: Of all requests.
        prompt_tokens: Of complete answers.
        completion_tokens: Of all answers, broken ones as far as they came.
        tokens_per_s: `completion_tokens` per second, of all streams together.
        stream_tokens_per_s: Median over the requests of tokens per second of a stream, 1 / TPOT.
        correct: Right answers.
        judged: Answers whose right one is known.
        broken: Why it did not keep the SLO, in words.
        latencies: By `LATENCIES` and `DISPATCH`: answers alone, refusals have none.
    """

    name: str
    seconds: float
    requests: int
    good: int
    outcomes: dict[str, int]
    requests_per_s: float
    goodput_per_s: float | None
    goodput_share: float | None
    prompt_tokens: int
    completion_tokens: int
    tokens_per_s: float
    stream_tokens_per_s: float | None
    correct: int
    judged: int
    broken: list[str]
    latencies: dict[str, Latency]

    @classmethod
    def of(cls, name: str, records: Sequence[Record], slo: Slo | None) -> Group:
        """The results of at least one record."""
        seconds = max(r.sent_at + r.e2e_s for r in records) - min(r.sent_at for r in records)
        good = [record for record in records if record.good]
        answers = [record for record in records if record.outcome == Outcome.OK]
        met = sum(map(slo.met, records)) if slo else None
        judged = [record.correct for record in answers if record.correct is not None]
        tokens = sum(record.completion_tokens or 0 for record in records)
        tpot = Distribution(record.tpot_s for record in answers if record.tpot_s)
        per_s = 1 / seconds if seconds > 0 else 0.0
        return cls(
            name=name,
            seconds=seconds,
            requests=len(records),
            good=len(good),
            outcomes=dict(Counter(record.outcome.value for record in records).most_common()),
            requests_per_s=len(good) * per_s,
            goodput_per_s=None if met is None else met * per_s,
            goodput_share=None if met is None else met / len(records),
            prompt_tokens=sum(record.prompt_tokens or 0 for record in answers),
            completion_tokens=tokens,
            tokens_per_s=tokens * per_s,
            stream_tokens_per_s=1 / tpot.percentile(50) if tpot else None,
            correct=sum(judged),
            judged=len(judged),
            broken=slo.broken(records) if slo else [],
            latencies=_latencies(records, answers),
        )


def _latencies(records: Sequence[Record], answers: Sequence[Record]) -> dict[str, Latency]:
    values: dict[str, Iterable[float]] = {
        name: [v for record in answers if (v := getattr(record, name)) is not None]
        for name in LATENCIES
        if name != "itl_s"
    }
    values["itl_s"] = (gap for record in answers for gap in record.gaps_s)
    values[DISPATCH] = [record.dispatch_lag_s for record in records if record.dispatch_lag_s is not None]
    found = {name: Latency.of(values[name]) for name in (*LATENCIES, DISPATCH)}
    return {name: latency for name, latency in found.items() if latency}


@dataclass(frozen=True)
class Results:
    """A run's.

    Attributes:
        run: What was run.
        slo: What it was judged by; None if by nothing.
        broken: Why the SLO was not kept, in words.
        total: All requests but the warm-up's; None if there is none.
        stages: A group each, in their order, of a search in that of their rates.
        kinds: Kinds of prompts, by name.
        languages: By name.
        warm_up: Requests left out.
        complete: All processes of the run came to their end.
        warnings: What makes the numbers doubtful.
        records: The requests, the warm-up's included, in the order they were sent.
        samples: In the order of their times.
    """

    run: Run
    slo: Slo | None
    broken: list[str]
    total: Group | None
    stages: list[Group]
    kinds: list[Group]
    languages: list[Group]
    warm_up: int
    complete: bool
    warnings: list[str]
    records: list[Record] = field(repr=False)
    samples: list[Sample] = field(repr=False)

    @classmethod
    def read(cls, folder: Path, slo: Slo | None) -> Results:
        """Of a run's folder; without an SLO judged by the one that the run had.

        Raises:
            RecordError: It holds no run.
            SloError: It was judged by something that a later release knows.
        """
        logs = read_all(folder)
        if slo is None and logs[0].run.slo:
            slo = Slo.parse(logs[0].run.slo)
        return cls.of(logs, slo)

    @classmethod
    def of(cls, logs: Sequence[Log], slo: Slo | None) -> Results:
        """Of what the processes of a run wrote down, at least one."""
        records = sorted((record for log in logs for record in log.records), key=lambda record: record.sent_at)
        samples = sorted((sample for log in logs for sample in log.samples), key=lambda sample: sample.at)
        measured = [record for record in records if not record.warm_up]

        def groups(of: Callable[[Record], str | None], *, sort: bool = True) -> list[Group]:
            names = dict.fromkeys(name for record in measured if (name := of(record)) is not None)
            order = sorted(names, key=_natural) if sort else list(names)
            return [Group.of(name, [r for r in measured if of(r) == name], slo) for name in order]

        total = Group.of("all", measured, slo) if measured else None
        run = logs[0].run
        stages = groups(lambda record: record.stage, sort=run.is_search)
        broken = (total.broken if total else slo.broken([])) if slo else []
        if run.is_search:
            # It goes on until a rate breaks it.
            broken = [] if any(not stage.broken for stage in stages) else ["no rate kept it; start lower"]
        return cls(
            run=run,
            slo=slo,
            broken=broken,
            total=total,
            stages=stages,
            kinds=groups(lambda record: record.kind),
            languages=groups(lambda record: record.language),
            warm_up=len(records) - len(measured),
            complete=len(logs) == run.sources and all(log.complete for log in logs),
            warnings=_warnings(logs, measured),
            records=records,
            samples=samples,
        )

    @property
    def verdict(self) -> str:
        """Whether the SLO was kept, in words; of a search the largest rate that kept it."""
        if self.broken or not self.run.is_search:
            return "; ".join(self.broken) or "kept"
        # A search names its stages by their rates, and tries each once.
        rates = {float(stage.name.removeprefix("rate ")): stage.broken for stage in self.stages}
        held = max(rate for rate, broken in rates.items() if not broken)
        beyond = min((rate for rate, broken in rates.items() if broken), default=None)
        return f"kept at {held:g} requests/s, " + (
            "the highest rate tried" if beyond is None else f"not at {beyond:g} ({'; '.join(rates[beyond])})"
        )

    @property
    def failed(self) -> bool:
        """Whether a part is missing, or the SLO was broken; without one: whether a request ended as it should not."""
        if not self.complete:
            return True
        if self.slo:
            return bool(self.broken)
        return self.total is None or self.total.good < self.total.requests

    def json(self) -> dict[str, Any]:
        """For machines: everything but the single requests, which are in the records."""
        found = {name: value for name, value in vars(self).items() if name not in ("records", "samples", "slo", "run")}
        groups = {
            name: [asdict(group) for group in value]
            for name, value in found.items()
            if name in ("stages", "kinds", "languages")
        }
        return {
            "version": VERSION,
            "run": asdict(self.run),
            "slo": str(self.slo) if self.slo else None,
            **found,
            "failed": self.failed,
            "total": asdict(self.total) if self.total else None,
            **groups,
            "memory": memory(self.samples),
        }


def memory(samples: Iterable[Sample]) -> dict[str, dict[str, float]]:
    """First, last and largest resident bytes of the client, the server's own account and a watched process."""
    found: dict[str, list[float]] = {}
    for sample in samples:
        if "resident_bytes" in sample.values:
            found.setdefault(sample.of, []).append(sample.values["resident_bytes"])
    return {of: {"first": values[0], "last": values[-1], "most": max(values)} for of, values in found.items()}


def _warnings(logs: Sequence[Log], measured: Sequence[Record]) -> list[str]:
    found = []
    if not measured:
        found.append("no request ended outside the warm-up: run it longer, or look at the log of the load test")
    if missing := sorted(set(range(logs[0].run.sources)) - {log.run.source for log in logs}):
        found.append(f"nothing came from worker {', '.join(map(str, missing))}: what it sent is not in these results")
    if lost := [log.run.source for log in logs if not log.complete]:
        found.append(
            f"worker {', '.join(map(str, lost))} did not come to its end: requests that it had under way, or had not"
            " yet reported, are not in these results"
        )
    lags = Distribution(record.client_lag_s for record in measured if record.client_lag_s is not None)
    if lags and lags.percentile(90) > LAG_S:
        found.append(
            f"the client is a bottleneck: for one request in ten it kept chunks waiting {lags.percentile(90) * 1e3:.0f}"
            " ms or longer, which latencies contain; give it a core of its own, or spread the load over more workers"
        )
    shares = [
        v["cpu_share"] for log in logs for s in log.samples if "cpu_share" in (v := s.values) and s.of == "client"
    ]
    if shares and sorted(shares)[len(shares) // 2] > CPU_SHARE:
        found.append(
            "the client is a bottleneck: it used its whole core most of the time; spread the load over more workers"
        )
    if unsent := sum(record.outcome == Outcome.NOT_SENT for record in measured):
        found.append(f"{unsent} requests were due and not sent, because `most_under_way` were under way already")
    late = Distribution(record.dispatch_lag_s for record in measured if record.dispatch_lag_s is not None)
    if late and late.percentile(99) > 0.1:
        found.append(
            f"one request in a hundred was sent {late.percentile(99):.2f} s late or more: the rate was not kept"
        )
    uncounted = sum(record.completion_tokens is None for record in measured if record.outcome == Outcome.OK)
    if uncounted:
        found.append(f"the server stated no usage for {uncounted} answers: their tokens are not counted")
    return found


def _natural(name: str) -> tuple[str, float]:
    head, _, number = name.rpartition(" ")
    try:
        return head, float(number)
    except ValueError:
        return name, 0.0


def title(run: Run) -> str:
    """A line that names a run."""
    begun = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(run.started_at))
    return f"{run.run}: {run.model} at {run.host}, {begun}"
