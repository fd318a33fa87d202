"""What others measure of the same server with the same traffic: `vllm bench serve` and guidellm beside ours."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from loadtest.compare import Array, interval, ratios
from loadtest.demo import serving
from loadtest.prompts import Sizing, needle_prompt
from loadtest.records import Outcome, read

pytestmark = [pytest.mark.system, pytest.mark.timeout(900)]

ROOT = Path(__file__).parents[2]
OTHERS = ROOT / ".venv-crosscheck" / "bin"
REQUESTS, STREAMS, TOKENS, PROMPT_TOKENS, SECONDS = 48, 4, 32, 384, 25
TOLERANCE = 0.05
CONFIDENCE = 0.999
"""Of each of six intervals: what agrees is not to fail by chance every third time."""
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
    """What one tool says: seconds of each request, and tokens per second of all."""

    ttft: Array
    tpot: Array
    e2e: Array
    tokens_per_s: float


@pytest.fixture(scope="module")
def measured(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Measured]:
    """Each tool's account, one after the other, of one server without a prefix cache: all send the same prompts."""
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
        return {name: tool(url, demo_model, folder) for name, tool in TOOLS.items()}


def run(command: list[str], folder: Path, name: str) -> None:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(folder), "VLLM_NO_USAGE_STATS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, f"{name} ended with {done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"


def ours(url: str, model: Path, folder: Path) -> Measured:
    command = [sys.executable, "-m", "loadtest", "--headless", "--only-summary"]
    command += [
        "--host",
        url,
        "--load-profile",
        str(folder / "same.toml"),
        "--records",
        str(folder),
        "--run-name",
        "ours",
    ]
    run(command, folder, "loadtest")
    found = read(folder / "ours" / "records-0.jsonl").records
    assert {record.outcome for record in found} == {Outcome.OK}
    assert {record.completion_tokens for record in found} == {TOKENS}
    report = json.loads((folder / "ours" / "report.json").read_text())
    return Measured(
        np.array([record.ttft_s for record in found], dtype=float),
        np.array([record.tpot_s for record in found], dtype=float),
        np.array([record.e2e_s for record in found], dtype=float),
        report["total"]["tokens_per_s"],
    )


def bench(url: str, model: Path, folder: Path) -> Measured:
    command = [str(OTHERS / "python"), "-c", BENCH, "--backend", "openai-chat", "--endpoint", "/v1/chat/completions"]
    command += ["--base-url", url, "--model", served(url), "--tokenizer", str(model), "--dataset-name", "custom"]
    command += [
        "--dataset-path",
        str(folder / "bench.jsonl"),
        "--custom-output-len",
        "-1",
        "--num-prompts",
        str(REQUESTS),
    ]
    command += ["--skip-chat-template", "--disable-shuffle", "--max-concurrency", str(STREAMS), "--ignore-eos"]
    command += [
        "--temperature",
        "0",
        "--save-result",
        "--save-detailed",
        "--result-filename",
        str(folder / "bench.json"),
    ]
    run(command, folder, "vllm bench serve")
    said = json.loads((folder / "bench.json").read_text())
    assert said["completed"] == REQUESTS
    ttft, e2e = np.array(said["ttfts"]), np.array(said["latencies"])
    tpot = (e2e - ttft) / (np.array(said["output_lens"]) - 1)
    assert tpot.mean() * 1e3 == pytest.approx(said["mean_tpot_ms"])
    return Measured(ttft, tpot, e2e, said["output_throughput"])


def guidellm(url: str, model: Path, folder: Path) -> Measured:
    command = [str(OTHERS / "guidellm"), "run", "--disable-console"]
    command += ["--backend", f"kind=openai_http,target={url},model={served(url)},request_format=/v1/chat/completions"]
    command += [
        "--profile",
        f"kind=concurrent,streams={STREAMS}",
        "--constraint",
        f"kind=max_requests,count={REQUESTS}",
    ]
    command += ["--tokenizer", f"kind=hf_auto,model={model}"]
    command += ["--data", f"kind=json_file,path={folder / 'guidellm.jsonl'}"]
    command += ["--output", f"kind=json,path={folder / 'guidellm.json'}"]
    run(command, folder, "guidellm")
    [said] = json.loads((folder / "guidellm.json").read_text())["benchmarks"]
    requests = said["requests"]["successful"]
    assert len(requests) == REQUESTS
    assert {request["output_tokens"] for request in requests} == {TOKENS}
    span = max(r["request_end_time"] for r in requests) - min(r["request_start_time"] for r in requests)
    return Measured(
        np.array([request["time_to_first_token_ms"] for request in requests]) / 1e3,
        # Its own time per output token holds the first token's wait; this is what others call TPOT.
        np.array([request["inter_token_latency_ms"] for request in requests]) / 1e3,
        np.array([request["request_latency"] for request in requests]),
        REQUESTS * TOKENS / span,
    )


TOOLS: dict[str, Callable[[str, Path, Path], Measured]] = {"bench": bench, "ours": ours, "guidellm": guidellm}
"""In their order: ours in the middle, so that a machine that gets slower or faster is not taken for a difference."""


def served(url: str) -> str:
    """Name of the model."""
    with urllib.request.urlopen(f"{url}/v1/models", timeout=10) as answer:
        name: str = json.load(answer)["data"][0]["id"]
        return name


@pytest.mark.parametrize("other", ["bench", "guidellm"])
@pytest.mark.parametrize("what", ["ttft", "tpot", "tokens_per_s"])
def test_others_agree_within_five_per_cent_or_the_bootstrap_interval(
    what: str, other: str, measured: dict[str, Measured]
) -> None:
    mine, theirs = measured["ours"], measured[other]
    ratio = np.mean(getattr(mine, what)) / np.mean(getattr(theirs, what))
    # With as many requests under way all the time, throughput is to the time of a request as 1 to 1.
    by = "e2e" if what == "tokens_per_s" else what
    before, after = (list(getattr(tool, by)[:, None]) for tool in (theirs, mine))
    low, high = interval(ratios(before, after, lambda values: float(values.mean())), CONFIDENCE)
    if what == "tokens_per_s":
        low, high = 1 / high, 1 / low
    width = max(TOLERANCE, high / ratio - 1, 1 - low / ratio)
    sys.stdout.write(f"{what}, ours / {other}: {ratio:.3f}, interval {low:.3f} - {high:.3f}\n")
    assert abs(ratio - 1) <= width
