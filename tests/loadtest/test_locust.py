"""Locust with our file, started as a person starts it."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

from loadtest import records

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
    start = [sys.executable, "-m", "locust", "-f", "loadtest/locustfile.py", "--host", server, "--model", model]
    return [*start, "--load-profile", str(folder / "p.toml"), "--records", str(folder), "--run-name", "run", *options]


def write(folder: Path, kind: str, level: str, seconds: int) -> None:
    (folder / "p.toml").write_text(PROFILE.format(kind=kind, level=level, seconds=seconds))


def run(arguments: list[str]) -> subprocess.CompletedProcess[str]:
    root = Path(__file__).parents[2]
    return subprocess.run(arguments, cwd=root, capture_output=True, text=True, check=False, timeout=60)


def test_a_run_ends_by_itself_with_all_records_and_rows_for_each_metric(server: str, tmp_path: Path) -> None:
    write(tmp_path, "open", "rate = 20", 2)
    done = run(command(server, tmp_path, "plain", "--headless", "--only-summary"))
    assert done.returncode == 0, done.stderr
    assert {line.split()[0] for line in done.stderr.splitlines() if " sum " in line} == {"e2e", "TTFT", "ITL", "tok/s"}
    head, found = records.read(tmp_path / "run" / "records-0.jsonl")
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


def test_ctrl_c_ends_at_once_and_keeps_what_was_recorded(server: str, tmp_path: Path) -> None:
    write(tmp_path, "closed", "users = 2", 600)
    path, root = tmp_path / "run" / "records-0.jsonl", Path(__file__).parents[2]
    arguments = command(server, tmp_path, "schedule", "--headless", "--only-summary")
    with subprocess.Popen(arguments, cwd=root, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 60
        while not (path.exists() and len(records.read(path)[1]) >= 2) and time.monotonic() < deadline:
            try:
                process.wait(0.1)
            except subprocess.TimeoutExpired:
                continue
            break
        process.send_signal(signal.SIGINT)
        process.wait(10)
    assert len(records.read(path)[1]) >= 2


def test_a_server_without_the_model_is_told_in_one_line(server: str, tmp_path: Path) -> None:
    write(tmp_path, "closed", "users = 1", 1)
    done = run(command(server, tmp_path, "nothing", "--headless", "--only-summary"))
    assert done.returncode == 2
    assert "loadtest: error: " in done.stderr
    assert "/v1/models lists plain" in done.stderr


def test_a_profile_that_is_not_there_is_told_in_one_line(server: str, tmp_path: Path) -> None:
    done = run(command(server, tmp_path, "plain", "--headless"))
    assert done.returncode != 0
    assert "no such profile" in done.stderr
    assert "Traceback" not in done.stderr
