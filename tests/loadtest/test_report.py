"""What a run's numbers are, and the files that show them."""

from __future__ import annotations

import csv
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hdrh.histogram import HdrHistogram

from load_runs import BEGAN, answer, failure, random_answers, write
from loadtest import report
from loadtest.distribution import Distribution
from loadtest.plots import token_times
from loadtest.records import Outcome, RecordError, Sample
from loadtest.results import Results
from loadtest.slo import Slo, SloError


def read(folder: Path, slo: str = "") -> Results:
    return Results.read(folder, Slo.parse(slo) if slo else None)


def test_percentiles_are_those_of_the_sorted_values_to_three_digits(seed: int) -> None:
    values = np.sort(np.random.default_rng(seed).lognormal(-2, 1.5, 5000))
    found = Distribution(values)
    for percent in (1, 50, 90, 99, 99.9, 100):
        rank = round(len(values) * percent / 100) - 1
        assert found.percentile(percent) == pytest.approx(values[rank], rel=1e-3, abs=1e-6)
    again = HdrHistogram.decode(found.encoded())
    assert again.get_total_count() == 5000
    assert again.get_value_at_percentile(90) / 1e6 == found.percentile(90)


def test_numbers_of_a_run_are_those_that_follow_from_its_requests(tmp_path: Path) -> None:
    warm = answer(0, ttft=9.0, stage="warm-up", warm_up=True)
    write(tmp_path, [warm, answer(10), answer(12, ttft=1.5, correct=False), failure(13, Outcome.SHED)])
    found = read(tmp_path, "ttft_s=1,failures=0.5,percentile=50")
    total = found.total
    assert total
    # From 10 to 12 + 1.5 + 10 × 0.05.
    assert total.seconds == pytest.approx(4.0)
    assert (total.requests, total.good, total.outcomes) == (3, 2, {"ok": 2, "shed": 1})
    assert total.tokens_per_s == pytest.approx(22 / 4)
    assert total.requests_per_s == pytest.approx(2 / 4)
    assert total.goodput_per_s == pytest.approx(1 / 4)
    assert total.goodput_share == pytest.approx(1 / 3)
    assert total.stream_tokens_per_s == pytest.approx(20, rel=1e-3)
    assert (total.correct, total.judged, found.warm_up) == (1, 2, 1)
    assert total.latencies["ttft_s"].count == 2
    assert total.latencies["ttft_s"].mean == pytest.approx(1.0, rel=1e-3)
    assert total.latencies["itl_s"].count == 20
    assert found.broken == []
    assert not found.failed
    assert read(tmp_path).failed  # without an SLO every request has to be good


def test_a_run_is_judged_again_as_it_was_unless_told_otherwise(tmp_path: Path) -> None:
    write(tmp_path, [answer(0, ttft=1.5)], slo=str(Slo(ttft_s=1)))
    assert report.main([str(tmp_path)]) == 1
    assert report.main([str(tmp_path), "--slo", "ttft_s=2"]) == 0
    assert read(tmp_path).slo == Slo(ttft_s=1)


def test_what_several_processes_wrote_is_one_run_and_a_missing_one_is_told(tmp_path: Path) -> None:
    write(tmp_path, [answer(1)], sources=3, source=0)
    write(tmp_path, [answer(0)], sources=3, source=2)
    found = read(tmp_path)
    assert [record.sent_at for record in found.records] == [BEGAN, BEGAN + 1]
    assert any("nothing came from worker 1:" in warning for warning in found.warnings)
    for begun in ("", '{"version":1,"type":"ru'):
        (tmp_path / "records-1.jsonl").write_text(begun)
        assert read(tmp_path) == found
        (tmp_path / "records-1.jsonl").unlink()
    write(tmp_path, [], run="other", sources=3, source=1)
    with pytest.raises(RecordError, match="of different runs"):
        read(tmp_path)


@pytest.mark.parametrize(
    ("slo", "reason"),
    [
        ("ttft_s=0.6,percentile=95", "TTFT p95 9.0"),
        ("ttft_s=0.6,percentile=80", ""),
        ("itl_s=0.01", "ITL p90 0.050"),
        ("tpot_s=0.01", "TPOT p90 0.050"),
        ("e2e_s=2,percentile=95", "e2e p95 9.5"),
        ("correct=1", "90.0% of 10 answers right, 100.0% wanted"),
        ("failures=0.05", "9.1% failed, 5.0% allowed"),
        ("first_content_s=1,failures=1,percentile=80", ""),
    ],
)
def test_an_slo_says_what_broke_it(tmp_path: Path, slo: str, reason: str) -> None:
    made = [answer(i) for i in range(9)] + [answer(9, ttft=9.0, correct=False), failure(10, Outcome.CUT)]
    broken = Slo.parse(slo if "failures" in slo else f"{slo},failures=0.1").broken(made)
    assert len(broken) == bool(reason)
    assert not reason or broken[0].startswith(reason)


@pytest.mark.parametrize(("failed", "count", "allowed"), [(1, 100, 0.01), (1, 20, 0.05), (3, 20, 0.15)])
def test_as_many_failures_as_an_slo_allows_keep_it(failed: int, count: int, allowed: float) -> None:
    made = [failure(i, Outcome.CUT) for i in range(failed)] + [answer(i) for i in range(failed, count)]
    assert Slo(failures=allowed).broken(made) == []
    assert Slo(failures=allowed).broken([*made, failure(count, Outcome.CUT)])


def test_a_latency_at_its_limit_keeps_an_slo_and_one_beyond_it_by_a_microsecond_is_shown_to_be() -> None:
    at, below = answer(0, ttft=2.0), answer(0, gap=0.09999)
    for slo, record in ((Slo(ttft_s=2), at), (Slo(itl_s=0.1), below), (Slo(tpot_s=0.1), below)):
        assert slo.met(record)
        assert slo.broken([record] * 100) == []
    assert Slo(ttft_s=2).broken([answer(0, ttft=2.000001)]) == ["TTFT p90 2.000001 s, 2 s allowed"]


def test_an_answer_without_what_an_slo_limits_does_not_keep_it_unless_it_is_of_one_chunk() -> None:
    thought, uncounted, short = (
        answer(0, first_content_s=None),
        answer(0, tpot_s=None),
        answer(0, chunks=1, tpot_s=None),
    )
    refused = failure(0, Outcome.OVER_CAP, expected=Outcome.OVER_CAP)
    assert not Slo(first_content_s=1).met(thought)
    assert Slo(ttft_s=1).met(thought)
    assert not Slo(tpot_s=1).met(uncounted)
    assert Slo(tpot_s=1, itl_s=1).met(short)
    assert Slo(first_content_s=1, tpot_s=1).met(refused)


def test_an_slo_that_nothing_was_measured_for_is_broken() -> None:
    assert Slo(ttft_s=1).broken([]) == ["no request ended"]
    assert Slo(itl_s=1).broken([answer(0, chunks=1)]) == ["no ITL was measured, 1 s allowed"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("ttft=1", "`ttft=1`: expected NAME=NUMBER with one of ttft_s"),
        ("ttft_s", "`ttft_s`: expected NAME=NUMBER"),
        ("ttft_s=fast", "`ttft_s`: expected a number, found `fast`"),
        ("ttft_s=-1", "`ttft_s`: expected seconds above 0"),
        ("ttft_s=1,ttft_s=2", "given twice"),
        ("failures=2", "`failures`: expected a share from 0 to 1"),
        ("percentile=0", "`percentile`: expected above 0"),
        (" , ", "no objective"),
    ],
)
def test_an_slo_that_is_none_is_refused(text: str, said: str) -> None:
    with pytest.raises(SloError) as refusal:
        Slo.parse(text)
    assert said in str(refusal.value)


def test_an_slo_reads_what_it_prints() -> None:
    text = "ttft_s=2,itl_s=0.1,failures=0.01,correct=0.9,percentile=95"
    assert str(Slo.parse(text)) == text


def test_a_search_is_judged_by_whether_any_rate_kept_the_slo(tmp_path: Path) -> None:
    profile = {"description": "s", "traffic": {"kind": "search"}}
    made = [answer(0, stage="rate 1"), answer(1, ttft=5.0, stage="rate 11.39"), answer(2, stage="rate 7.5")]
    write(tmp_path, made, profile=profile)
    found = read(tmp_path, "ttft_s=1")
    assert not found.failed
    assert [stage.name for stage in found.stages] == ["rate 1", "rate 7.5", "rate 11.39"]
    assert [bool(stage.broken) for stage in found.stages] == [False, False, True]
    assert found.verdict == "kept at 7.5 requests/s, not at 11.39 (TTFT p90 5.000 s, 1 s allowed)"
    assert f"SLO {found.slo}: {found.verdict}" in report.summary(found)
    assert read(tmp_path, "ttft_s=9").verdict == "kept at 11.39 requests/s, the highest rate tried"
    nothing = read(tmp_path, "ttft_s=0.1")
    assert nothing.failed
    assert nothing.verdict == "no rate kept it; start lower"


@pytest.mark.parametrize(
    ("made", "samples", "said"),
    [
        ([answer(0, client_lag_s=0.02)], [], "the client is a bottleneck: for one request in ten"),
        ([answer(0)], [Sample(BEGAN, "client", {"cpu_share": 0.97})], "it used its whole core"),
        ([answer(0), failure(1, Outcome.NOT_SENT)], [], "1 requests were due and not sent"),
        ([answer(0, dispatch_lag_s=0.4)], [], "sent 0.40 s late"),
        ([answer(0, completion_tokens=None)], [], "no usage for 1 answers"),
        ([answer(0, warm_up=True)], [], "no request ended outside the warm-up"),
    ],
)  # fmt: skip
def test_what_makes_numbers_doubtful_is_told(tmp_path: Path, made: Any, samples: Any, said: str) -> None:
    write(tmp_path, made, samples)
    assert any(said in warning for warning in read(tmp_path).warnings)


def test_a_run_without_doubts_has_no_warning(tmp_path: Path) -> None:
    sample = Sample(BEGAN, "client", {"cpu_share": 0.2})
    assert read(write(tmp_path, [answer(0, client_lag_s=0.001, dispatch_lag_s=0.002)], [sample])).warnings == []


def test_tokens_are_placed_in_time_by_their_counts() -> None:
    record = answer(0, ttft=1.0, gap=0.5, chunks=3, gap_tokens=(2, 4), completion_tokens=9)
    assert list(token_times(record)) == [(BEGAN + 1.0, 3), (BEGAN + 1.5, 2), (BEGAN + 2.0, 4)]
    assert sum(tokens for _, tokens in token_times(answer(0, gap_tokens=()))) == pytest.approx(11)


class Page(HTMLParser):
    """Opens what it closes, and nothing else; and what it refers to outside itself."""

    VOID = ("meta", "br", "link")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.outside: list[str] = []
        self.ids: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in self.VOID:
            self.open.append(tag)
        given = dict(attrs)
        self.ids += [given["id"] or ""] if "id" in given else []
        self.outside += [
            v or "" for k, v in attrs if k in ("src", "href", "xlink:href") and not (v or "").startswith("#")
        ]

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_is_one_file_with_the_numbers_and_a_plot_of_each_kind(tmp_path: Path, seed: int) -> None:
    made = [*random_answers(seed, 60), failure(31, Outcome.SHED, detail="<script>alert(1)</script>")]
    for i, n in enumerate((128, 512, 1024) * 3):
        made.append(
            answer(32 + i, kind=f"needle {n}", language="ja", stage="rate 4", prompt_tokens=n, cached_tokens=n % 512)
        )
    values = {"resident_bytes": 2.0**28, "running": 3.0, "waiting": 1.0, "kv_cache_share": 0.5}
    samples = [Sample(BEGAN + i, of, values) for i in range(5) for of in ("client", "server")]
    samples.append(Sample(BEGAN + 5, "client", {"resident_bytes": 2.0**28 + 4}))
    write(tmp_path, made, samples)
    found = read(tmp_path, "ttft_s=0.1,failures=0.5")
    page = report.write(tmp_path, found)
    text = page.read_text(encoding="utf-8")
    parsed = Page(text)
    assert parsed.open == []
    assert parsed.outside == []
    assert len(parsed.ids) == len(set(parsed.ids))
    assert text.count("<svg") == 7
    assert "<script" not in text
    assert "TTFT p90" in text
    assert found.total
    assert f"{found.total.latencies['ttft_s'].percentiles['99'] * 1e3:,.1f}" in text
    body = json.loads((tmp_path / "report.json").read_text())
    assert body["total"]["outcomes"] == {"ok": 69, "shed": 1}
    assert body["memory"]["client"] == {"first": 2**28, "last": 2**28 + 4, "most": 2**28 + 4}
    assert body["failed"]
    with (tmp_path / "requests.csv").open(encoding="utf-8", newline="") as file:
        assert len(list(csv.DictReader(file))) == 70
    with (tmp_path / "groups.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["of"], row["name"]) for row in rows][:3] == [
        ("total", "all"),
        ("stage", "rate 2"),
        ("stage", "rate 4"),
    ]
    assert float(rows[0]["ttft_s_99"]) == found.total.latencies["ttft_s"].percentiles["99"]
    assert not list(tmp_path.glob(".*"))


def test_a_run_that_nothing_came_of_is_reported_too(tmp_path: Path) -> None:
    page = report.write(tmp_path, read(write(tmp_path, [])))
    assert "no request ended outside the warm-up" in page.read_text()


def test_the_command_says_by_its_exit_code_whether_the_slo_was_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path, [answer(0), answer(1)])
    assert report.main([str(tmp_path)]) == 0
    assert report.main([str(tmp_path), "--slo", "ttft_s=1"]) == 0
    assert "SLO ttft_s=1,failures=0,percentile=90: kept" in capsys.readouterr().out
    assert report.main([str(tmp_path), "--slo", "ttft_s=0.1"]) == 1
    assert re.search(r"SLO .*: TTFT p90 0.500 s, 0.1 s allowed", capsys.readouterr().out)
    assert report.main([str(tmp_path), "--slo", "ttft=1"]) == 2
    assert report.main([str(tmp_path / "nowhere")]) == 2
    assert "name the folder of a run" in capsys.readouterr().err
