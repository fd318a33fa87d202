"""Prompts, arrivals, the search, and what is read from files."""

from __future__ import annotations

import random
import time
from itertools import islice, pairwise
from pathlib import Path

import gevent
import pytest

from loadtest import profiles, records
from loadtest.client import Client
from loadtest.load import Load
from loadtest.profiles import ProfileError
from loadtest.prompts import LANGUAGES, Message, Mix, Part, Prompt, Sizing, needle_prompt
from loadtest.records import Log, Outcome, Record, RecordError, Run, Sample, Writer
from loadtest.replay import ReplayError, read_prompts
from loadtest.shapes import Climb, Search, Stage, arrivals
from loadtest.sse import Events

SIZING = Sizing(2.5, 4096, measured=True)
PROFILES = sorted(path.stem for path in profiles.FOLDER.glob("*.toml"))
OPEN = """description = "d"
[traffic]
kind = "open"
rate = {rate}
seconds = 1
most_under_way = {bound}
[[prompts]]
kind = "sum"
"""


@pytest.mark.parametrize("name", PROFILES)
def test_every_profile_can_be_read_and_asks_the_same_with_the_same_seed(name: str) -> None:
    profile = profiles.read(profiles.find(name))
    parts = profile.parts(SIZING)
    first, second = (Mix(parts, profile.seed), Mix(parts, profile.seed))
    assert [first.draw(i) for i in range(50)] == [second.draw(i) for i in reversed(range(50))][::-1]


def test_a_sweep_reaches_the_cap_and_beyond_it_and_leaves_out_what_lies_between() -> None:
    profile = profiles.read(profiles.find("context-sweep"))
    drawn = [Mix(profile.parts(SIZING), 0).draw(i) for i in range(200)]
    needles = {p.wanted_tokens for p in drawn if p.kind.startswith("needle")}
    assert needles == {128, 256, 512, 1024, 2048, round((4096 - 64) * profiles.MARGIN)}
    over = [p for p in drawn if p.kind == "over cap"]
    assert over
    assert all(p.expected == Outcome.OVER_CAP and len(p.text) / 2.5 > 4096 for p in over)


def test_stages_of_one_level_are_told_apart() -> None:
    stages = profiles.read(profiles.find("burst")).traffic.stages
    names = [stage.name for stage in stages if not stage.warm_up]
    assert names == ["rate 1", "rate 10", "rate 1 (2)"]


def test_another_salt_makes_another_list_and_asks_the_same() -> None:
    profile = profiles.read(profiles.find("context-sweep"))

    def drawn(salt: str) -> list[Prompt]:
        return [p for p in map(Mix(profile.parts(SIZING, salt), 0).draw, range(40)) if p.kind.startswith("needle")]

    first, second = drawn("a"), drawn("b")
    assert first == drawn("a")
    assert [(p.kind, p.language, p.answer, len(p.text)) for p in first] == [
        (p.kind, p.language, p.answer, len(p.text)) for p in second
    ]
    # A prefix cache knows none of them, from this run or the other: not even the first row is the same.
    rows = [p.text.split("\n")[0] for p in [*first, *second]]
    assert len(set(rows)) > 0.9 * len(rows)


def test_a_long_prompt_keeps_nobody_waiting() -> None:
    needle_prompt(random.Random(0), "en", 64, SIZING)
    began = time.process_time()
    prompt = needle_prompt(random.Random(1), "en", 800_000, SIZING)
    assert time.process_time() - began < 0.05
    assert len(prompt.text) / 2.5 == pytest.approx(800_000, rel=0.01)
    assert prompt.text.count(f"#{prompt.answer}\n") == 1


def test_the_lag_of_an_open_loop_holds_the_making_of_the_prompt(server: str, tmp_path: Path) -> None:
    path = tmp_path / "p.toml"
    path.write_text(OPEN.format(rate=5, bound=20))
    profile = profiles.read(path)

    def slow(_: random.Random, __: int) -> Prompt:
        gevent.sleep(0.1)
        return Prompt("sum", "en", (Message("user", "6 × 7 = ?"),))

    found: list[Record] = []
    Load(profile, Client(server, "plain"), Mix([Part(slow, 1.0)], 0), found.append).run()
    assert found
    assert all(record.dispatch_lag_s is not None and record.dispatch_lag_s >= 0.1 for record in found)


def test_a_needle_is_about_as_long_as_asked_for() -> None:
    for tokens in (128, 1024, 8192):
        prompt = needle_prompt(random.Random(1), "ja", tokens, SIZING)
        assert len(prompt.text) / 2.5 == pytest.approx(tokens - 24, rel=0.1, abs=12)
        assert prompt.answer
        assert f"#{prompt.answer}\n" in prompt.text


@pytest.mark.parametrize(
    ("answer", "content", "right"),
    [
        ("46", "12+34=46\nThe answer is 46.", True),
        ("46", "答えは４６です。", True),
        ("1692", "The answer is **1,692**.", True),
        ("46", "46 was my first thought.\nThe answer is 47.", False),
        ("5", "9-4=5", True),
        ("5", "The answer is -5.", False),
        ("46", "The answer is 146.", False),
        ("0042", "Tom #0042", True),
        ("Paris", "It is paris.", True),
        ("46", "", False),
    ],
)
def test_an_answer_is_judged_by_its_last_line(answer: str, content: str, right: bool) -> None:
    assert Prompt("sum", "en", (), answer).is_right(content) == right


def test_arrivals_keep_their_rate_are_seeded_and_split_over_sources() -> None:
    stages = [Stage(100, rate=20), Stage(50, rate=2)]
    once = list(arrivals(stages, seed=3))
    assert once == list(arrivals(stages, seed=3))
    first = [arrival for arrival in once if arrival.stage.rate == 20]
    # Poisson: five standard deviations of either count.
    assert abs(len(first) - 2000) < 5 * 2000**0.5
    assert abs(len(once) - len(first) - 100) < 5 * 100**0.5
    halves = [list(arrivals(stages, 3, source, 2)) for source in (0, 1)]
    assert abs(sum(map(len, halves)) - 2100) < 5 * 2100**0.5
    assert halves[0] != halves[1]
    gaps = [b.at - a.at for a, b in pairwise(first)]
    mean = sum(gaps) / len(gaps)
    assert sum((gap - mean) ** 2 for gap in gaps) / len(gaps) == pytest.approx(mean**2, rel=0.2)


def test_a_search_names_the_largest_rate_that_held() -> None:
    climb = Climb(Search(1, 2, 100, 3, 60, 0))
    tried = []
    while (rate := climb.next_rate()) is not None:
        tried.append(rate)
        climb.tell(rate, held=rate <= 5.2)
    assert tried == [1, 2, 4, 8, 6, 5, 5.5]
    assert (climb.held, climb.broke) == (5, 5.5)


def test_slow_answers_do_not_close_the_open_loop_and_its_bound_is_told(server: str, tmp_path: Path) -> None:
    path = tmp_path / "p.toml"
    path.write_text(OPEN.format(rate=60, bound=20))
    profile = profiles.read(path)
    found: list[Record] = []
    # Every answer takes over two seconds, and all arrivals are within one.
    load = Load(profile, Client(server, "schedule"), Mix(profile.parts(SIZING), 0), found.append)
    load.run()
    due = list(arrivals(profile.traffic.stages, 0))
    assert len(found) == len(due) > 30
    assert sum(record.outcome == Outcome.OK for record in found) == 20
    assert all("most_under_way" in record.detail for record in found if record.outcome == Outcome.NOT_SENT)
    assert all(record.dispatch_lag_s is not None and record.dispatch_lag_s < 0.5 for record in found)
    assert load.ended


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (("rate = 1", "rate = -1"), "`rate`: expected a number above 0, found -1"),
        (("rate = 1", "rte = 1"), "`users`: expected either `users`"),
        (("seconds = 1", "seconds = 1\nspeed = 2"), "[traffic]: `speed`: unknown key"),
        (('"open"', '"opn"'), "`kind`: expected one of closed, open"),
        (('"sum"', '"sum"\nlanguages = ["fr"]'), "prompts[0]: `languages`: expected some of en, ja, zh"),
        (('"sum"', '"replay"\nfile = "none.jsonl"'), "none.jsonl: cannot be read"),
        (('"sum"', '"needle"\ntokens = [1]'), "`tokens`: expected a list of whole numbers of at least 64"),
        (("[traffic]", "[options]\nmax_tokens = true\n[traffic]"), "`max_tokens`: expected a whole number"),
        (("[traffic]", "[traffic"), "no TOML"),
    ],
)
def test_a_wrong_profile_is_refused_with_file_and_key(tmp_path: Path, change: tuple[str, str], said: str) -> None:
    path = tmp_path / "p.toml"
    path.write_text(OPEN.format(rate=1, bound=9).replace(*change))
    with pytest.raises((ProfileError, ReplayError)) as refusal:
        profiles.read(path)
    assert said in str(refusal.value)
    assert str(tmp_path) in str(refusal.value)


def test_a_profile_that_is_not_there_is_answered_with_those_that_are() -> None:
    with pytest.raises(ProfileError, match="burst, chat, context-sweep"):
        profiles.find("nothing")


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "no JSON"),
        ("[]", "expected an object"),
        ("{}", "either `messages` or `prompt`"),
        ('{"prompt": "a", "answr": "b"}', "unknown key `answr`"),
        ('{"prompt": "a", "max_tokens": true}', "`max_tokens`: expected int"),
        ('{"messages": [{"role": "me", "content": ""}]}', "messages[0]: expected a role"),
    ],
)
def test_a_line_that_cannot_be_replayed_is_refused_with_its_number(tmp_path: Path, line: str, said: str) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "12 + 34 = ?", "answer": "46"}\n\n' + line + "\n")
    with pytest.raises(ReplayError) as refusal:
        read_prompts(path)
    assert str(refusal.value).startswith(f"{path}:3: ")
    assert said in str(refusal.value)


def test_prompts_are_replayed_in_their_order(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "a"}\n{"messages": [{"role": "user", "content": "b"}], "language": "zh"}\n')
    assert [p.messages for p in read_prompts(path)] == [(Message("user", "a"),), (Message("user", "b"),)]


def test_sources_begin_a_replay_apart(tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text("".join(f'{{"prompt": "{i}"}}\n' for i in range(4)))
    path = tmp_path / "p.toml"
    path.write_text(OPEN.format(rate=1, bound=9).replace('"sum"', '"replay"\nfile = "p.jsonl"'))
    profile = profiles.read(path)
    mixes = [Mix(profile.parts(SIZING, begin=source / 2), 0, source) for source in (0, 1)]
    assert [[mix.draw(i).text for i in range(3)] for mix in mixes] == [["0", "1", "2"], ["2", "3", "0"]]


def test_records_come_back_as_they_were_written_and_a_torn_last_line_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "run" / "records-0.jsonl"
    run = Run("r", 1.0, "http://h", "m", {"a": 1}, 4096)
    record = Record("1", "rate 1", False, "sum", "ja", "chat", True, 2.5, Outcome.CUT, gaps_s=(0.1,), gap_tokens=(2,))
    sample = Sample(3.0, "server", {"running": 2.0})
    with Writer(path, run) as writer:
        writer.write(record)
        writer.write(sample)
        # Read while it is open: nothing waits in a buffer.
        assert records.read(path) == Log(run, [record], [sample])
    with path.open("a") as file:
        file.write('{"version":1,"type":"requ')
    assert records.read(path) == Log(run, [record], [sample], complete=True)
    path.write_text(path.read_text().replace('"version":1', '"version":9'))
    with pytest.raises(RecordError, match=":1: version 9"):
        records.read(path)


def test_events_survive_any_split() -> None:
    stream = "\ufeffdata: ä\r\n\r\n: note\n\ndata: 1\ndata:2\r\rid: 3\ndata: \u2028x\n\ndata: open".encode()
    for size in range(1, len(stream) + 1):
        events = Events()
        found = [data for i in range(0, len(stream), size) for data in events.feed(stream[i : i + size])]
        assert found == ["ä", "1\n2", "\u2028x"], size
        assert events.open


def test_a_mix_draws_every_language() -> None:
    parts = profiles.read(profiles.find("smoke")).parts(SIZING)
    assert {p.language for p in islice(map(Mix(parts, 0).draw, range(60)), 60)} == set(LANGUAGES)
