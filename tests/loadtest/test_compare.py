"""Whether two runs differ: found where they do, at most as often as the interval says where they do not."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest

from load_runs import BEGAN, PROFILE, answer, random_answers, write
from loadtest import compare
from loadtest.compare import CompareError
from loadtest.records import Sample
from loadtest.results import Results


def results(folder: Path, *arguments: object, **changes: object) -> Results:
    return Results.read(write(folder, *arguments, **changes), None)  # type: ignore[arg-type]


def test_a_server_that_got_slower_is_found_out_and_one_that_did_not_is_not(tmp_path: Path, seed: int) -> None:
    before = results(tmp_path / "a", random_answers(seed, 150))
    slower = results(tmp_path / "b", random_answers(seed + 1, 150, slower=1.3))
    verdicts = {d.name: d for d in compare.compare(before, slower)}
    for name in ("TTFT p50, s", "TTFT mean, s", "ITL mean, s", "TPOT p50, s"):
        assert verdicts[name].verdict == "worse"
        low, high = verdicts[name].low, verdicts[name].high
        assert low
        assert high
        # Of four intervals of 95 % one in ten times one misses 1.3, the truth; none by a third of the difference.
        assert 1 < low < 1.4
        assert high > 1.2
    same = compare.compare(before, before)
    assert {d.ratio for d in same} == {1.0}
    assert {d.verdict for d in same} == {"no difference found", "too few values"}
    assert {d.name for d in same} >= {"tokens per second in all", "share of right answers", "share of good requests"}


def test_intervals_hold_the_truth_about_as_often_as_they_say(seed: int) -> None:
    mean = next(m for m in compare.MEASURES if m.name == "TTFT mean, s")
    held = 0
    for i in range(40):
        old, new = ([np.array([r.ttft_s]) for r in random_answers(seed + 2 * i + k, 60)] for k in (0, 1))
        low, high = compare.interval(compare.ratios(old, new, mean.statistic))
        held += low <= 1 <= high
    # Of 40 intervals of 95 %, fewer than 33 hold with a chance below 1 in 3,000.
    assert held >= 33


def test_different_configurations_are_refused_unless_allowed(tmp_path: Path) -> None:
    before = results(tmp_path / "a", [answer(0)])
    other = {**PROFILE, "traffic": {"kind": "open", "rate": 3}}
    after = results(tmp_path / "b", [answer(0)], profile=other, model="glm-2")
    with pytest.raises(CompareError, match=r"differ in `model`: glm and glm-2; .* --allow model"):
        compare.compare(before, after)
    with pytest.raises(CompareError, match=r"differ in `profile`: `traffic.rate` is 2 and 3"):
        compare.compare(before, after, allow=["model"])
    assert compare.compare(before, after, allow=["model", "profile"])


def test_few_values_get_no_interval(tmp_path: Path) -> None:
    found = compare.compare(results(tmp_path / "a", [answer(0)]), results(tmp_path / "b", [answer(0)]))
    assert {(d.verdict, d.low) for d in found} == {("too few values", None)}


def test_a_percentile_is_judged_only_with_ten_requests_beyond_it(tmp_path: Path, seed: int) -> None:
    before, after = (random_answers(seed + i, 150, slower=2.0**i) for i in (0, 1))
    verdicts = {
        d.name: d.verdict for d in compare.compare(results(tmp_path / "a", before), results(tmp_path / "b", after))
    }
    assert (verdicts["TTFT p90, s"], verdicts["TTFT p99, s"]) == ("worse", "too few values")
    # Gaps of one answer are long together: of 150 there are over a thousand, and 1 % of them may be one answer's.
    assert (verdicts["ITL p90, s"], verdicts["ITL p99, s"]) == ("worse", "too few values")


def test_means_and_medians_are_judged_of_30_requests_and_nothing_of_29(
    tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compare, "RESAMPLES", 100)
    for count, judged in ((29, set()), (30, {"mean", "p50", "share"})):
        runs = [results(tmp_path / f"{count}{i}", random_answers(seed + i, count)) for i in (0, 1)]
        names = [d.name for d in compare.compare(*runs) if d.verdict != "too few values"]
        assert {next(w for w in ("mean", "p50", "share", name) if w in name) for name in names} == judged


def test_throughput_is_judged_by_blocks_four_times_as_long_as_answers(tmp_path: Path) -> None:
    measure = next(m for m in compare.MEASURES if m.name == "tokens per second in all")
    # Answers of 2 s, five tokens a second each, and a request every half second.
    made = [answer(i / 2, ttft=1.0, gap=0.25, chunks=5, completion_tokens=5) for i in range(400)]
    blocks = measure.values(results(tmp_path / "a", made[:321]))
    assert len(blocks) == measure.fewest
    assert np.mean(blocks[1:]) == pytest.approx(10, rel=0.01)
    assert len(measure.values(results(tmp_path / "b", made[:320]))) == measure.fewest - 1
    assert len(measure.values(results(tmp_path / "c", made[:6]))) == 1
    assert len(measure.values(results(tmp_path / "d", made))) == measure.fewest


@pytest.mark.parametrize(
    ("name", "gaps", "tries", "most"),
    [
        ("TTFT mean, s", 1, 200, 26),
        ("ITL mean, s", 50, 200, 26),
        ("ITL p50, s", 20, 100, 15),
        ("ITL p90, s", 20, 100, 15),
    ],
)
def test_equal_runs_of_the_fewest_requests_are_seldom_called_different(
    name: str, gaps: int, tries: int, most: int, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compare, "RESAMPLES", 120)
    measure = next(m for m in compare.MEASURES if m.name == name)
    draw, called = np.random.default_rng(seed), 0
    for _ in range(tries):
        # Answers differ, and so do the gaps of each.
        old, new = (
            list(draw.lognormal(0, 0.3, (measure.fewest, 1)) * draw.lognormal(0, 0.3, (measure.fewest, gaps)))
            for _ in "ab"
        )
        called += compare.chance(compare.ratios(old, new, measure.statistic)) < 0.05
    # It differs 4 to 7 times in 100, more often than `most` with a chance below 1 in 1,000.
    assert called <= most


def test_chances_are_corrected_as_holm_has_it() -> None:
    assert compare.corrected([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert compare.corrected([0.6, 0.5]) == [1.0, 1.0]


def test_among_many_equal_measures_hardly_one_is_called_different(seed: int) -> None:
    draw, called = np.random.default_rng(seed), 0
    for _ in range(10):
        pairs = [[[np.array([v]) for v in draw.lognormal(0, 0.3, 40)] for _ in "ab"] for _ in range(20)]
        chances = [compare.chance(compare.ratios(old, new, lambda v: float(v.mean()))) for old, new in pairs]
        called += min(compare.corrected(chances)) < 0.05
    # Uncorrected it would be six or more of ten. Of ten at 5 %, four or more have a chance of 1 in 1,000.
    assert called <= 3


def test_a_measure_that_was_nothing_before_has_no_ratio_and_can_still_be_better(tmp_path: Path, seed: int) -> None:
    wrong = [replace(record, correct=False) for record in random_answers(seed, 60)]
    found = {
        d.name: d
        for d in compare.compare(results(tmp_path / "a", wrong), results(tmp_path / "b", random_answers(seed, 60)))
    }
    right = found["share of right answers"]
    assert (right.before, right.ratio, right.high, right.verdict) == (0, None, None, "better")
    json.dumps([asdict(d) for d in found.values()], allow_nan=False)
    assert "inf" in compare.table(list(found.values()))
    same = compare.compare(results(tmp_path / "c", wrong), results(tmp_path / "d", wrong))
    assert next(d.ratio for d in same if d.name == right.name) == 1


def test_a_prefix_cache_that_helped_one_run_alone_is_warned_of(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, cached in (("a", 1), ("b", 19)):
        write(tmp_path / name, [answer(i, cached_tokens=cached) for i in range(3)])
    assert compare.main([str(tmp_path / "a"), str(tmp_path / "b")]) == 0
    assert "warning: the prefix cache held 5% of the prompt tokens before and 95% after" in capsys.readouterr().out
    assert "the prefix cache held" in (tmp_path / "b" / "compare.html").read_text()
    seen = [
        Sample(BEGAN + at, "server", {"prefix_cache_queried_tokens": 100.0 + at, "prefix_cache_hit_tokens": at / 4})
        for at in (0, 40)
    ]
    write(tmp_path / "c", [answer(0)], seen)
    assert compare.cached_share(Results.read(tmp_path / "c", None)) == pytest.approx(0.25)


def test_the_command_writes_a_page_and_says_by_its_exit_code_whether_it_got_worse(
    tmp_path: Path, seed: int, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path / "a", random_answers(seed, 60))
    write(tmp_path / "b", random_answers(seed, 60, slower=2.0))
    a, b = str(tmp_path / "a"), str(tmp_path / "b")
    assert compare.main([a, b]) == 1
    assert compare.main([a, a]) == 0
    assert compare.main([b, a, "--out", str(tmp_path)]) == 0
    body = json.loads((tmp_path / "compare.json").read_text())
    assert {d["verdict"] for d in body["differences"] if d["name"].startswith("TTFT")} == {"better", "too few values"}
    assert "better" in (tmp_path / "compare.html").read_text()
    assert compare.main([a, str(tmp_path / "c")]) == 2
    assert "name the folder of a run" in capsys.readouterr().err
