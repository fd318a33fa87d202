"""Locust with our file, started as a person starts it."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

import pytest

from loadtest import handover, records
from loadtest.ports import free_port
from loadtest.shapes import Stage, arrivals

ROOT = Path(__file__).parents[2]
LOCUST = [sys.executable, "-m", "loadtest"]
PROFILE = """description = "d"
[traffic]
kind = "{kind}"
{level}
seconds = {seconds}
warm_up_s = 1
[[prompts]]
kind = "sum"
"""


def command(server: str, folder: Path, model: str, *options: str) -> list[str]:
    start = [*LOCUST, "--host", server, "--model", model]
    return [*start, "--load-profile", str(folder / "p.toml"), "--records", str(folder), "--run-name", "run", *options]


def write(folder: Path, kind: str, level: str, seconds: int) -> None:
    (folder / "p.toml").write_text(PROFILE.format(kind=kind, level=level, seconds=seconds))


def run(arguments: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, check=False, timeout=60)


def test_a_run_ends_by_itself_with_all_records_and_rows_for_each_metric(server: str, tmp_path: Path) -> None:
    write(tmp_path, "open", "rate = 20", 2)
    done = run(command(server, tmp_path, "plain", "--headless", "--only-summary"))
    assert done.returncode == 0, done.stderr
    assert {line.split()[0] for line in done.stderr.splitlines() if " sum " in line} == {"e2e", "TTFT", "ITL", "tok/s"}
    log = records.read(tmp_path / "run" / "records-0.jsonl")
    head, found = log.run, log.records
    assert (head.model, head.max_model_len) == ("plain", 4096)
    assert {record.stage for record in found} == {"warm-up", "rate 20"}
    measured = [record for record in found if not record.warm_up]
    total = next(line for line in done.stderr.splitlines() if "Aggregated" in line)
    assert total.split()[1] == str(len(measured))
    assert all(record.dispatch_lag_s is not None for record in found)


def test_failures_are_counted_by_class_and_make_the_exit_code(server: str, tmp_path: Path) -> None:
    write(tmp_path, "closed", "users = 1\nthink_s = 0.1", 1)
    done = run(command(server, tmp_path, "no-done", "--headless", "--only-summary"))
    assert done.returncode == 1
    assert "no_done" in done.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_ends_at_once_and_reports_what_was_recorded_as_incomplete(
    server: str, tmp_path: Path, number: signal.Signals
) -> None:
    # As many as keep the process busy: the signal comes while one of their greenlets runs.
    write(tmp_path, "closed", "users = 64", 600)
    path = tmp_path / "run" / "records-0.jsonl"
    with started(command(server, tmp_path, "plain", "--headless", "--only-summary")) as process:
        wait_for(lambda: sum(len(log.records) for log in read_logs(path.parent)) >= 2)
        process.send_signal(number)
        assert process.wait(20) == 1
    log = records.read(path)
    assert len(log.records) >= 2
    assert not log.complete
    assert "did not come to its end" in (tmp_path / "run" / "report.html").read_text()


def test_a_single_process_whose_set_up_takes_longer_than_a_second_runs(tmp_path: Path) -> None:
    write(tmp_path, "open", "rate = 20", 1)
    script = Path(__file__).parents[1] / "streaming_server.py"
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
        options = ["--headless", "--only-summary", "--wait-s", "30"]
        with started(command(f"http://127.0.0.1:{port}", tmp_path, "plain", *options)) as process:
            # It looks every half second.
            for _ in range(5):
                closed.accept()[0].close()
            closed.close()
            with subprocess.Popen([sys.executable, str(script), str(port)], stdout=subprocess.DEVNULL) as server:
                assert process.wait(30) == 0
                server.terminate()
    assert records.read(tmp_path / "run" / "records-0.jsonl").complete


@contextmanager
def started(arguments: list[str]) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(arguments, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
        out, err = process.communicate() if process.stdout and not process.stdout.closed else ("", "")
        sys.stdout.write(f"{arguments[4:]}: {process.returncode}\n{out}{err}")


def distributed(server: str, folder: Path, model: str, *options: str) -> tuple[list[str], list[str]]:
    """Commands of a master and of its workers, which are told nothing but where the master is."""
    port = str(free_port())
    master = [*command(server, folder, model, "--headless", "--only-summary", *options), "--master"]
    master += ["--expect-workers", "2", "--master-bind-host", "127.0.0.1", "--master-bind-port", port]
    worker = [*LOCUST, "--worker", "--master-host", "127.0.0.1", "--master-port", port]
    return master, worker


@pytest.mark.slow
def test_two_workers_share_the_rate_and_the_master_reports_for_both(server: str, tmp_path: Path) -> None:
    write(tmp_path, "open", "rate = 20", 4)
    master, worker = distributed(server, tmp_path, "plain", "--slo", "ttft_s=2,failures=0")
    with started(worker) as one, started(worker) as two:
        done = run(master)
        assert done.returncode == 0, done.stderr
        assert [one.wait(20), two.wait(20)] == [0, 0]
    logs = records.read_all(tmp_path / "run")
    assert [log.run.source for log in logs] == [0, 1]
    assert {log.run.sources for log in logs} == {2}
    [(salt, slo)] = {(log.run.salt, log.run.slo) for log in logs}
    assert (len(salt), slo) == (8, "ttft_s=2,failures=0,percentile=90")
    due = sum(len(list(arrivals([Stage(1, rate=20, warm_up=True), Stage(4, rate=20)], 0, i, 2))) for i in (0, 1))
    assert sum(len(log.records) for log in logs) == due
    assert all(log.records for log in logs)
    assert any(sample.of == "client" for log in logs for sample in log.samples)
    assert "SLO ttft_s=2,failures=0,percentile=90: kept" in done.stdout
    assert (tmp_path / "run" / "report.html").is_file()


@pytest.mark.slow
def test_workers_that_come_and_go_leave_each_of_the_users_with_one_worker(server: str, tmp_path: Path) -> None:
    write(tmp_path, "closed", "users = 4", 8)
    master, worker = distributed(server, tmp_path, "schedule")
    log = tmp_path / "master.log"

    def told(text: str) -> bool:
        return log.exists() and text in log.read_text()

    with started([*master, "--expect-workers", "3", "--logfile", str(log)]) as leader, started(worker) as gone:
        wait_for(lambda: told("(index 0) reported as ready"))
        with started(worker):
            wait_for(lambda: told("(index 1) reported as ready"))
            gone.terminate()
            wait_for(lambda: told("(index 0) quit"))
            with started(worker), started(worker):
                wait_for(lambda: len(read_logs(tmp_path / "run")) == 3)
                with started(worker) as late:
                    wait_for(lambda: told("(index 4) reported as ready"))
                    assert leader.wait(60) == 0
                    assert late.wait(20) == 0
    logs = records.read_all(tmp_path / "run")
    assert [(log.run.source, log.run.sources, log.complete) for log in logs] == [(i, 3, True) for i in range(3)]
    assert [most_under_way(log.records) for log in logs] == [2, 1, 1]


def most_under_way(found: list[records.Record]) -> int:
    return max(sum(a.sent_at <= b.sent_at < a.sent_at + a.e2e_s for a in found) for b in found)


@pytest.mark.slow
@pytest.mark.parametrize("headless", [True, False])
def test_a_master_that_is_terminated_reports_what_its_workers_had_sent_and_they_quit(
    server: str, tmp_path: Path, headless: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A worker that Locust stops is unknown to its master until it is ready again, and not told to quit meanwhile.
    monkeypatch.setenv("LOCUST_WORKER_ADDITIONAL_WAIT_BEFORE_READY_AFTER_STOP", "60")
    write(tmp_path, "open", "rate = 20", 600)
    master, worker = distributed(server, tmp_path, "schedule")
    if not headless:
        master.remove("--headless")
        master += ["--autostart", "--autoquit", "0", "--web-host", "127.0.0.1", "--web-port", str(free_port())]
    folder = tmp_path / "run"
    with started(worker) as one, started(worker) as two, started(master) as leader:
        wait_for(lambda: len(read_logs(folder)) == 2 and all(len(log.records) >= 8 for log in read_logs(folder)))
        leader.terminate()
        assert leader.wait(30) == 1
        assert [one.wait(20), two.wait(20)] == [0, 0]
    logs = records.read_all(folder)
    assert [log.complete for log in logs] == [False, False]
    # What a worker had not yet sent when it was told to stop.
    assert all(log.samples[-1].at > max(r.sent_at + r.e2e_s for r in log.records) for log in logs)
    assert "worker 0, 1 did not come to its end" in (folder / "report.html").read_text()


@pytest.mark.parametrize(("limit", "number"), [("2", None), ("0", signal.SIGINT), ("0", signal.SIGTERM)])
def test_a_master_without_workers_has_run_nothing(
    server: str, tmp_path: Path, limit: str, number: signal.Signals | None
) -> None:
    write(tmp_path, "closed", "users = 1", 1)
    master, _ = distributed(server, tmp_path, "plain", "--expect-workers-max-wait", limit)
    with started([*master, "--logfile", str(tmp_path / "log")]) as leader:
        if number is not None:
            wait_for(lambda: "waiting for" in (tmp_path / "log").read_text() if (tmp_path / "log").exists() else False)
            leader.send_signal(number)
        _, err = leader.communicate(timeout=30)
        assert leader.returncode == 2
        assert "loadtest: error: 0 of 2 workers are here; " in err


@pytest.mark.slow
def test_what_a_worker_that_is_killed_had_sent_is_kept_and_its_loss_ends_in_the_report(
    server: str, tmp_path: Path
) -> None:
    write(tmp_path, "closed", "users = 4", 600)
    master, worker = distributed(server, tmp_path, "schedule")
    with started(worker) as one, started(worker), started(master) as leader:
        lost = tmp_path / "run"
        wait_for(lambda: sum(len(log.records) for log in read_logs(lost)) >= 8 and len(read_logs(lost)) == 2)
        one.kill()
        kept = len(records.read_all(lost)[0].records), len(records.read_all(lost)[1].records)
        leader.send_signal(signal.SIGINT)
        assert leader.wait(60) == 1
    # Neither the worker that is gone nor the interrupted one.
    assert not any(log.complete for log in records.read_all(lost))
    assert "worker 0, 1 did not come to its end" in (lost / "report.html").read_text()
    after = [len(log.records) for log in records.read_all(lost)]
    assert all(now >= before for now, before in zip(after, kept, strict=True))
    assert (lost / "report.html").is_file()


@pytest.mark.slow
def test_a_worker_that_cannot_begin_ends_the_run_with_its_reason(server: str, tmp_path: Path) -> None:
    write(tmp_path, "closed", "users = 2", 600)
    master, worker = distributed(server, tmp_path, "nothing")
    with started(worker), started(worker):
        done = run(master)
    assert done.returncode == 2
    assert "/v1/models lists plain" in done.stderr


@pytest.mark.slow
def test_locusts_own_page_starts_a_run_and_shows_the_metrics_of_language_models(server: str, tmp_path: Path) -> None:
    write(tmp_path, "open", "rate = 20", 3)
    port = free_port()
    page = f"http://127.0.0.1:{port}"

    def get(path: str, data: bytes | None = None) -> str:
        with urllib.request.urlopen(page + path, data, timeout=30) as answer:
            text: str = answer.read().decode()
            return text

    def swarm(name: str) -> bool:
        form = urllib.parse.urlencode({"user_count": 1, "spawn_rate": 1, "host": server, "run_name": name})
        return bool(json.loads(get("/swarm", form.encode()))["success"])

    def begins(name: str) -> bool:
        return swarm(name) and (tmp_path / name).exists()

    def answers() -> bool:
        with suppress(OSError):
            return bool(get("/"))
        return False

    options = command(server, tmp_path, "plain", "--web-host", "127.0.0.1", "--web-port", str(port))
    with started(options) as process:
        wait_for(answers)
        assert "Language model" in get("/")
        with pytest.raises(urllib.error.HTTPError, match="404"):
            get("/report")
        # The form's own field: a second run must not be told that the first one's folder is taken.
        for name in ("first", "second"):
            # The second time it is refused, which must not end the run after it.
            swarm("first")
            wait_for(partial(begins, name))
            # Locust's page keeps what it has told for two seconds: it may still be that the first one has stopped.
            wait_for((tmp_path / name / "report.html").is_file)
            wait_for(lambda: json.loads(get("/stats/requests"))["state"] == "stopped")
            stats = json.loads(get("/stats/requests"))
            assert {row["method"] for row in stats["stats"]} >= {"e2e", "TTFT", "ITL", "tok/s"}
            [table] = stats["extended_stats"]
            assert [row["name"] for row in table["data"]] == ["sum", "all"]
            assert table["data"][1]["ttft_50"] > 0
            assert "Latencies, in milliseconds" in get("/report")
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0


def read_logs(folder: Path) -> list[records.Log]:
    return records.read_all(folder) if any(path.stat().st_size for path in folder.glob("records-*.jsonl")) else []


def wait_for(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < deadline, "not within a minute"
        time.sleep(0.1)


def test_a_server_without_the_model_is_told_in_one_line(server: str, tmp_path: Path) -> None:
    write(tmp_path, "closed", "users = 1", 1)
    done = run(command(server, tmp_path, "nothing", "--headless", "--only-summary"))
    assert done.returncode == 2
    assert "loadtest: error: " in done.stderr
    assert "/v1/models lists plain" in done.stderr


def test_a_profile_that_is_not_there_or_an_slo_that_is_none_is_told_in_one_line(server: str, tmp_path: Path) -> None:
    options = command(server, tmp_path, "plain", "--headless")
    done = run(options)
    assert done.returncode == 2
    assert "no such profile" in done.stderr
    assert "Traceback" not in done.stderr
    write(tmp_path, "closed", "users = 1", 1)
    done = run([*options, "--slo", "speed=1"])
    assert done.returncode == 2
    assert "loadtest: error: " in done.stderr
    assert "Traceback" not in done.stderr


def test_a_page_is_handed_over_once_its_load_test_is_gone_however_it_went(tmp_path: Path) -> None:
    lock, page = tmp_path / "lock", tmp_path / "report.html"
    holder = (
        "import time; from pathlib import Path; from loadtest import handover;"
        f" handover.hold(Path({str(lock)!r})); time.sleep(600)"
    )
    waiter = [sys.executable, "-m", "loadtest.handover", str(lock), str(page)]
    with started(waiter) as waiting, started([sys.executable, "-c", holder]) as held:
        wait_for(lock.exists)
        page.write_text("<!doctype html>")
        with pytest.raises(subprocess.TimeoutExpired):
            waiting.wait(0.5)
        held.kill()
        out, err = waiting.communicate(timeout=20)
        assert (out, err, waiting.returncode) == ("<!doctype html>", "", 0)
    with started([*waiter[:-1], str(tmp_path / "none.html")]) as waiting:
        assert waiting.wait(20) == 1


def test_a_load_test_that_never_began_is_not_waited_for_without_end(tmp_path: Path) -> None:
    with pytest.raises(TimeoutError, match=r"no load test began within 0\.1 s"):
        handover.wait(tmp_path / "lock", 0.1)
