"""Locust's own page, with what it lacks: a tab of the metrics of language models, and the report of the run so far."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from flask import Response, request
from locust.web import WebUI

from loadtest.distribution import Distribution
from loadtest.records import Record

if TYPE_CHECKING:
    from loadtest.session import Session

KEY = "language-model"
REPORT = "/report"
COLUMNS = {
    "name": "Kind of prompt", "requests": "Requests", "failed": "Failed", "right": "Right", "tokens": "Tokens",
    "ttft_50": "TTFT p50 (ms)", "ttft_99": "TTFT p99 (ms)", "itl_50": "ITL p50 (ms)", "itl_99": "ITL p99 (ms)",
    "tpot_50": "TPOT p50 (ms)", "stream": "tok/s of a stream",
}  # fmt: skip


class Live:
    """Results of a run so far, by kind of prompt, without keeping its requests."""

    def __init__(self) -> None:
        self._kinds: dict[str, _Kind] = {}

    def add(self, record: Record) -> None:
        """Counts a request that is not of the warm-up."""
        if not record.warm_up:
            for name in (record.kind, "all"):
                self._kinds.setdefault(name, _Kind()).add(record)

    def rows(self) -> list[dict[str, Any]]:
        """One for each kind, and one for all, with the keys of `COLUMNS`."""
        names = sorted(self._kinds, key=lambda name: (name == "all", name))
        return [{"name": name, **self._kinds[name].row()} for name in names]


class _Kind:
    def __init__(self) -> None:
        self.requests = self.failed = self.right = self.judged = self.tokens = 0
        self.latencies = {name: Distribution() for name in ("ttft", "itl", "tpot")}

    def add(self, record: Record) -> None:
        self.requests += 1
        self.failed += not record.good
        self.tokens += record.completion_tokens or 0
        if record.correct is not None:
            self.judged += 1
            self.right += record.correct
        for name, values in (("ttft", [record.ttft_s]), ("itl", record.gaps_s), ("tpot", [record.tpot_s])):
            for value in values:
                if value is not None:
                    self.latencies[name].add(value)

    def row(self) -> dict[str, Any]:
        def ms(name: str, percent: float) -> float | None:
            found = self.latencies[name]
            return round(found.percentile(percent) * 1e3, 1) if found else None

        tpot = ms("tpot", 50)
        return {
            "requests": self.requests,
            "failed": self.failed,
            "right": f"{self.right} of {self.judged}" if self.judged else "",
            "tokens": self.tokens,
            "ttft_50": ms("ttft", 50),
            "ttft_99": ms("ttft", 99),
            "itl_50": ms("itl", 50),
            "itl_99": ms("itl", 99),
            "tpot_50": tpot,
            "stream": round(1e3 / tpot, 1) if tpot else None,
        }


def extend(ui: WebUI, session: Session) -> None:
    """Adds the tab, and the report under `REPORT`, to the page of a master or a single process."""
    structure = [{"key": key, "title": title} for key, title in COLUMNS.items()]
    ui.template_args |= {
        "extended_tabs": [{"title": "Language model", "key": KEY}],
        "extended_tables": [{"key": KEY, "structure": structure}],
        "extended_csv_files": [{"href": REPORT, "title": "Report of the run so far"}],
    }

    def stats(response: Response) -> Response:
        if request.path == "/stats/requests" and response.is_json:
            body = {**response.get_json(), "extended_stats": [{"key": KEY, "data": session.live.rows()}]}
            response.set_data(json.dumps(body))
        return response

    def report() -> tuple[str, int] | str:
        return session.page() or ("no run has begun", 404)

    assert ui.app
    ui.app.after_request(stats)
    ui.app.add_url_rule(REPORT, view_func=ui.auth_required_if_enabled(report))
