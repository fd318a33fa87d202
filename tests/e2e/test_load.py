"""Load tests against the demo's server: every kind of prompt, both APIs, refusals, and its own metrics."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from e2e.conftest import KEY, Server
from loadtest.records import Log, Outcome, read

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]

ROOT = Path(__file__).parents[2]
EVERYTHING = """description = "everything, briefly"
# Of each kind there are two from the seventh to the eighteenth request: after the warm-up, and soon.
seed = 9
[options]
max_tokens = 200
reasoning = true
[traffic]
kind = "closed"
users = 3
seconds = 12
warm_up_s = 2
[[prompts]]
kind = "sum"
[[prompts]]
kind = "word"
[[prompts]]
kind = "needle"
tokens = [128, 256]
[[prompts]]
kind = "over_cap"
"""
COMPLETIONS = """description = "the other API"
[options]
api = "completions"
max_tokens = 16
ignore_eos = true
[traffic]
kind = "open"
rate = 2
seconds = 4
[[prompts]]
kind = "sum"
"""


def load(server: Server, folder: Path, profile: str, key: str = KEY, *options: str) -> subprocess.CompletedProcess[str]:
    (folder / "p.toml").write_text(profile)
    command = [sys.executable, "-m", "loadtest", "--headless", "--only-summary"]
    command += ["--host", server.url, "--load-profile", str(folder / "p.toml"), "--records", str(folder)]
    command += ["--run-name", "run", "--watch-pid", str(server.process.pid), *options]
    environment = {**os.environ, "VLLM_API_KEY": key}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=200)


def results(folder: Path) -> tuple[Log, Any]:
    return read(folder / "run" / "records-0.jsonl"), json.loads((folder / "run" / "report.json").read_text())


def test_every_kind_of_prompt_is_answered_counted_and_judged(server: Server, tmp_path: Path) -> None:
    done = load(server, tmp_path, EVERYTHING)
    assert done.returncode == 0, done.stdout + done.stderr
    log, report = results(tmp_path)
    assert log.run.max_model_len == 4096
    by_kind = {group["name"]: group for group in report["kinds"]}
    assert by_kind.keys() == {"sum", "word", "needle 128", "needle 256", "over cap"}
    assert by_kind["over cap"]["outcomes"] == {"over_cap": by_kind["over cap"]["requests"]}
    assert report["total"]["correct"] >= 0.7 * report["total"]["judged"] > 0
    answers = [record for record in log.records if record.outcome == Outcome.OK]
    for record in answers:
        assert record.completion_tokens
        # A chunk may hold several tokens, and tokens without text make none.
        assert sum(record.gap_tokens) <= record.completion_tokens
        assert record.ttft_s is not None
        assert record.first_content_s is not None
        assert record.ttft_s <= record.first_content_s <= record.e2e_s
    assert any(record.first_content_s > record.ttft_s for record in answers if record.first_content_s and record.ttft_s)
    assert all(record.reasoning_chars for record in answers if record.kind == "sum")
    for record in answers:
        if record.wanted_tokens and record.prompt_tokens:
            assert record.prompt_tokens == pytest.approx(record.wanted_tokens, rel=0.25)
    seen = [sample.values for sample in log.samples if sample.of == "server"]
    assert any(values["running"] > 0 for values in seen)
    assert seen[-1]["generated_tokens"] > seen[0]["generated_tokens"]
    assert report["memory"]["process"]["most"] > 5e8


def test_the_other_api_is_loaded_alike(server: Server, tmp_path: Path) -> None:
    done = load(server, tmp_path, COMPLETIONS)
    assert done.returncode == 0, done.stdout + done.stderr
    log, _ = results(tmp_path)
    assert log.records
    assert {record.completion_tokens for record in log.records} == {16}
    assert all(record.tpot_s for record in log.records)


def test_a_wrong_key_ends_the_run_with_a_line_that_says_where_the_key_is_from(server: Server, tmp_path: Path) -> None:
    done = load(server, tmp_path, COMPLETIONS, "wrong")
    assert done.returncode == 2
    assert "the key in VLLM_API_KEY" in done.stderr
    assert "wrong" not in done.stdout + done.stderr
