"""Two promises, kept by a share of what is served: the time to the first token, and that from token to token.

Alerts go by how fast the month's allowance of slow ones is used up, over a long window (it matters) and a short one (it
still goes on), as in the Google SRE workbook, chapter 5, "Multiwindow, Multi-Burn-Rate Alerts".
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from vqserve_ops.monitoring.rules import SCOPE, SUM_BY_RELEASE, Alert, Group, Recording


@dataclass(frozen=True)
class Promise:
    """That most of a histogram's samples stay below one of its bounds.

    Attributes:
        name: In recorded names.
        alert: How its alerts' names begin.
        histogram: vLLM's, in seconds.
        bound: Placeholder of the bound, which has to be the upper bound of a bucket: nothing is known in between.
        fewest: Samples in the long window below which nothing is said: three requests in a night are no trend.
        what: The samples, in words.
        slow: What a bad one did, in words.
    """

    name: str
    alert: str
    histogram: str
    bound: str
    fewest: int
    what: str
    slow: str


@dataclass(frozen=True)
class Burn:
    """A rate at which the allowance of 30 days is used up.

    Attributes:
        factor: How many times too fast.
        long: Window that says that it matters.
        short: Window that says that it goes on, a twelfth of `long`.
    """

    factor: float
    long: str
    short: str


FAST = (Burn(14.4, "1h", "5m"), Burn(6, "6h", "30m"))
"""2 % of the allowance in an hour, 5 % in six: somebody is woken."""
SLOW = (Burn(3, "1d", "2h"), Burn(1, "3d", "6h"))
"""10 % in a day or in three: somebody looks at it in the day."""

PROMISES = (
    Promise(
        name="ttft",
        alert="VqserveTtftBudgetBurns",
        histogram="vllm:time_to_first_token_seconds",
        bound="${ttftSeconds}",
        fewest=20,
        what="requests",
        slow="waited longer than ${ttftSeconds} s for their first token",
    ),
    Promise(
        name="inter_token",
        alert="VqserveInterTokenBudgetBurns",
        histogram="vllm:inter_token_latency_seconds",
        bound="${interTokenSeconds}",
        fewest=2000,  # some twenty answers
        what="steps of answers",
        slow="took longer than ${interTokenSeconds} s",
    ),
)


def groups() -> list[Group]:
    """Per promise the shares of slow samples in all windows, then its two alerts."""
    return [
        Group(f"vqserve.slo.{promise.name}", [*_recordings(promise), _fast(promise), _slow(promise)])
        for promise in PROMISES
    ]


def _recordings(promise: Promise) -> list[Recording]:
    burns = [*FAST, *SLOW]
    windows = dict.fromkeys(window for burn in burns for window in (burn.short, burn.long))
    shares = [Recording(_share(promise, window), _share_of(promise, window)) for window in windows]
    counts = [
        Recording(
            _count(promise, burn.long),
            f"{SUM_BY_RELEASE} (increase({promise.histogram}_count{{{SCOPE}}}[{burn.long}]))",
        )
        for burn in burns
    ]
    return shares + counts


def _share_of(promise: Promise, window: str) -> str:
    within = f'{promise.histogram}_bucket{{{SCOPE},le="{promise.bound}"}}'
    every = f"{promise.histogram}_count{{{SCOPE}}}"
    return f"1 - (\n  {SUM_BY_RELEASE} (rate({within}[{window}]))\n  /\n  {SUM_BY_RELEASE} (rate({every}[{window}]))\n)"


def _fast(promise: Promise) -> Alert:
    return _alert(promise, "Fast", FAST, "2m", "critical", "At this rate the allowance of 30 days is gone within days.")


def _slow(promise: Promise) -> Alert:
    return _alert(promise, "Slowly", SLOW, "15m", "warning", "At this rate the allowance of 30 days will not last.")


def _alert(
    promise: Promise, how: str, burns: tuple[Burn, ...], after: str, severity: Literal["critical", "warning"], end: str
) -> Alert:
    windows = " or ".join(burn.long for burn in burns)
    share = "{{ $value | humanizePercentage }}"
    return Alert(
        name=promise.alert + how,
        expr="\nor\n".join(_too_fast(promise, burn) for burn in burns),
        after=after,
        severity=severity,
        summary=f"Too many {promise.what} {promise.slow}.",
        description=(
            f"{share} of the {promise.what} of {{{{ $labels.namespace }}}}/{{{{ $labels.service }}}} in the last"
            f" {windows} {promise.slow}; a share of ${{objective}} is to be faster. {end}"
        ),
    )


def _too_fast(promise: Promise, burn: Burn) -> str:
    allowed = f"{burn.factor:g} * (1 - ${{objective}})"
    return (
        f"(\n  {_share(promise, burn.long)}{{{SCOPE}}} > {allowed}\n"
        f"  and {_share(promise, burn.short)}{{{SCOPE}}} > {allowed}\n"
        f"  and {_count(promise, burn.long)}{{{SCOPE}}} >= {promise.fewest}\n)"
    )


def _share(promise: Promise, window: str) -> str:
    return f"vqserve:{promise.name}_slow:share_rate{window}"


def _count(promise: Promise, window: str) -> str:
    return f"vqserve:{promise.name}:count_increase{window}"
