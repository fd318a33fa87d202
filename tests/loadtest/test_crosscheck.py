"""What others measure of the same server with the same traffic: `vllm bench serve` and guidellm beside ours."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import pytest

from loadtest.compare import Array, interval, ratios
from loadtest.demo import serving
from loadtest.prompts import Sizing, needle_prompt
from loadtest.records import Outcome, read

pytestmark = [pytest.mark.system, pytest.mark.timeout(1200)]

ROOT = Path(__file__).parents[2]
OTHERS = ROOT / ".venv-crosscheck" / "bin"
REQUESTS, STREAMS, TOKENS, PROMPT_TOKENS = 36, 4, 32, 384
SECONDS = 10
"""Of our own traffic in a round: about as many requests as the others', so that the last ones weigh the same."""
BLOCK = STREAMS
"""Requests drawn together: those under way at the same time share a slow moment of the machine."""
TOLERANCE = 0.05
CONFIDENCE = 0.999
"""Of each of six intervals: what agrees is not to fail by chance every third time."""
PARTS = 3
"""Of two rounds of each tool, at most."""
WHAT, OTHER = ("ttft", "tpot", "tokens_per_s"), ("bench", "guidellm")
BENCH = """
from vllm.benchmarks.serve import add_cli_args, main
from vllm.utils.argparse_utils import FlexibleArgumentParser
parser = FlexibleArgumentParser()
add_cli_args(parser)
main(parser.parse_args())
"""
PROFILE = f"""description = "the same traffic"
[options]
max_tokens = {TOKENS}
ignore_eos = true
[traffic]
kind = "closed"
users = {STREAMS}
seconds = {SECONDS}
[[prompts]]
kind = "replay"
file = "ours.jsonl"
"""


@dataclass(frozen=True)
class Measured:
    """What one tool says: seconds of each request, in the order of starts, and tokens per second of each round."""

    ttft: Array
    tpot: Array
    e2e: Array
    tokens_per_s: Array

    def and_then(self, later: Measured) -> Measured:
        """This and a later round."""
        names = (field.name for field in fields(self))
        return Measured(*(np.concatenate([getattr(self, name), getattr(later, name)]) for name in names))


@pytest.fixture(scope="module")
def measured(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Measured]:
    """Each tool's account of one server without a prefix cache, to which all send the same prompts.

    One after the other, and then in the opposite order: a machine that gets slower or faster is not taken for a
    difference between tools. What disagrees is measured again, and counts with the rest: a difference between tools
    stays, one by what else the machine did does not.
    """
    if not OTHERS.is_dir():
        pytest.fail(
            f"{OTHERS} is not there: `make test-system` installs vllm bench's and guidellm's needs, and runs this"
        )
    folder = tmp_path_factory.mktemp("crosscheck")
    draw = random.Random(0)
    texts = [needle_prompt(draw, "en", PROMPT_TOKENS, Sizing()).text for _ in range(REQUESTS)]
    for name, key in (("ours", "max_tokens"), ("bench", "output_tokens"), ("guidellm", "output_tokens_count")):
        lines = [json.dumps({"prompt": text, key: TOKENS}) for text in texts]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "same.toml").write_text(PROFILE)
    with serving(demo_model, folder / "server.log", "--", "--no-enable-prefix-caching") as (url, _):
        found: dict[str, Measured] = {}
        for part in range(PARTS):
            for again, tools in enumerate((TOOLS, reversed(TOOLS))):
                for name in tools:
                    said = TOOLS[name](url, demo_model, folder / f"{part}-{again}")
                    found[name] = found[name].and_then(said) if name in found else said
            if all(compared(what, found["ours"], found[other]).agree for what in WHAT for other in OTHER):
                break
    return found


def run(command: list[str], folder: Path, name: str) -> None:
    folder.mkdir(exist_ok=True)
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(folder), "VLLM_NO_USAGE_STATS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, f"{name} ended with {done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"


def ours(url: str, model: Path, folder: Path) -> Measured:
    command = [sys.executable, "-m", "loadtest", "--headless", "--only-summary"]
    command += ["--host", url, "--load-profile", str(folder.parent / "same.toml")]
    command += ["--records", str(folder), "--run-name", "ours"]
    run(command, folder, "loadtest")
    found = sorted(read(folder / "ours" / "records-0.jsonl").records, key=lambda record: record.sent_at)
    assert {record.outcome for record in found} == {Outcome.OK}
    assert {record.completion_tokens for record in found} == {TOKENS}
    report = json.loads((folder / "ours" / "report.json").read_text())
    return Measured(
        np.array([record.ttft_s for record in found], dtype=float),
        np.array([record.tpot_s for record in found], dtype=float),
        np.array([record.e2e_s for record in found], dtype=float),
        np.array([report["total"]["tokens_per_s"]]),
    )


def bench(url: str, model: Path, folder: Path) -> Measured:
    command = [str(OTHERS / "python"), "-c", BENCH, "--backend", "openai-chat", "--endpoint", "/v1/chat/completions"]
    command += ["--base-url", url, "--model", served(url), "--tokenizer", str(model), "--dataset-name", "custom"]
    command += ["--dataset-path", str(folder.parent / "bench.jsonl"), "--custom-output-len", "-1"]
    command += ["--num-prompts", str(REQUESTS)]
    command += ["--skip-chat-template", "--disable-shuffle", "--max-concurrency", str(STREAMS), "--ignore-eos"]
    command += ["--temperature", "0", "--save-result", "--save-detailed"]
    command += ["--result-filename", str(folder / "bench.json")]
    run(command, folder, "vllm bench serve")
    said = json.loads((folder / "bench.json").read_text())
    assert said["completed"] == REQUESTS
    order = np.argsort(said["start_times"])
    ttft, e2e, tokens = (np.array(said[name])[order] for name in ("ttfts", "latencies", "output_lens"))
    tpot = (e2e - ttft) / (tokens - 1)
    assert tpot.mean() * 1e3 == pytest.approx(said["mean_tpot_ms"])
    return Measured(ttft, tpot, e2e, np.array([said["output_throughput"]]))


def guidellm(url: str, model: Path, folder: Path) -> Measured:
    command = [str(OTHERS / "guidellm"), "run", "--disable-console"]
    command += ["--backend", f"kind=openai_http,target={url},model={served(url)},request_format=/v1/chat/completions"]
    command += ["--profile", f"kind=concurrent,streams={STREAMS}"]
    command += ["--constraint", f"kind=max_requests,count={REQUESTS}"]
    command += ["--tokenizer", f"kind=hf_auto,model={model}"]
    command += ["--data", f"kind=json_file,path={folder.parent / 'guidellm.jsonl'}"]
    command += ["--output", f"kind=json,path={folder / 'guidellm.json'}"]
    run(command, folder, "guidellm")
    [said] = json.loads((folder / "guidellm.json").read_text())["benchmarks"]
    requests = sorted(said["requests"]["successful"], key=lambda request: request["request_start_time"])
    assert len(requests) == REQUESTS
    assert {request["output_tokens"] for request in requests} == {TOKENS}
    span = max(r["request_end_time"] for r in requests) - min(r["request_start_time"] for r in requests)
    return Measured(
        np.array([request["time_to_first_token_ms"] for request in requests]) / 1e3,
        # Its own time per output token holds the first token's wait; this is what others call TPOT.
        np.array([request["inter_token_latency_ms"] for request in requests]) / 1e3,
        np.array([request["request_latency"] for request in requests]),
        np.array([REQUESTS * TOKENS / span]),
    )


TOOLS: dict[str, Callable[[str, Path, Path], Measured]] = {"bench": bench, "ours": ours, "guidellm": guidellm}


def blocks(values: Array) -> list[Array]:
    """Of requests in the order of their starts."""
    return np.array_split(values, len(values) // BLOCK)


def served(url: str) -> str:
    """Name of the model."""
    with urllib.request.urlopen(f"{url}/v1/models", timeout=10) as answer:
        name: str = json.load(answer)["data"][0]["id"]
        return name


@dataclass(frozen=True)
class Compared:
    """A ratio of means, ours over the other's, and half of its interval, as a share of it."""

    ratio: float
    chance: float

    @property
    def agree(self) -> bool:
        return abs(self.ratio - 1) <= max(TOLERANCE, self.chance)


def compared(what: str, mine: Measured, theirs: Measured) -> Compared:
    # With as many requests under way all the time, throughput is to the time of a request as 1 to 1.
    by = "e2e" if what == "tokens_per_s" else what
    before, after = (blocks(getattr(tool, by)) for tool in (theirs, mine))
    drawn = ratios(before, after, lambda values: float(values.mean()))
    low, high = interval(drawn if by == what else 1 / drawn, CONFIDENCE)
    ratio = np.mean(getattr(mine, what)) / np.mean(getattr(theirs, what))
    return Compared(float(ratio), chance=(high - low) / (high + low))


@pytest.mark.parametrize("other", OTHER)
@pytest.mark.parametrize("what", WHAT)
def test_others_agree_within_five_per_cent_or_the_bootstrap_interval(
    what: str, other: str, measured: dict[str, Measured]
) -> None:
    found = compared(what, measured["ours"], measured[other])
    rounds = len(measured["ours"].tokens_per_s)
    sys.stdout.write(f"{what}, ours / {other}, {rounds} rounds: {found}\n")
    assert found.agree


@pytest.mark.parametrize(("factor", "agree"), [(1.0, True), (1.03, True), (0.97, True), (1.3, False), (0.7, False)])
def test_a_tool_that_measures_something_else_does_not_agree(factor: float, agree: bool) -> None:
    rng = np.random.default_rng()
    (mine, theirs) = rng.normal(1.0, 0.02, (2, 2 * REQUESTS))
    found = [
        Measured(ttft=seconds, tpot=seconds, e2e=seconds, tokens_per_s=np.array([1 / seconds.mean()]))
        for seconds in (mine, factor * theirs)
    ]
    assert [compared(what, *found).agree for what in WHAT] == 3 * [agree]
