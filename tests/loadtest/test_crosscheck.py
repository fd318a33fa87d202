"""What others measure of the same server with the same traffic: `vllm bench serve` and guidellm beside ours."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families

from loadtest.demo import serving
from loadtest.prompts import Sizing, needle_prompt
from loadtest.records import Outcome, read

pytestmark = [pytest.mark.system, pytest.mark.timeout(1200)]

ROOT = Path(__file__).parents[2]
OTHERS = ROOT / ".venv-crosscheck" / "bin"
REQUESTS, STREAMS, TOKENS, PROMPT_TOKENS = 36, 4, 32, 384
SECONDS = 10
"""Of our own traffic: about as many requests as the others', so that the last ones weigh the same."""
TOLERANCE = 0.05
ATTEMPTS = 3
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
class Figures:
    """Means over requests: seconds to the first token, and for each after it; tokens per second of all streams."""

    ttft: float
    tpot: float
    tokens_per_s: float


Tool = Callable[[str, Path, Path], tuple[Figures, int]]
"""Loads a server's address with a model into a folder; what it says, and how many requests it sent."""


@dataclass(frozen=True)
class Said:
    """What a tool says, and what the server counted of the same requests."""

    tool: Figures
    server: Figures

    def of_the_servers(self, what: str) -> float:
        return float(getattr(self.tool, what) / getattr(self.server, what))


@pytest.fixture(scope="module")
def measured(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Said]:
    """Each tool's account of one server without a prefix cache, to which all send the same prompts.

    On the server's own cores: a tool that takes more of them, as guidellm does, has a slower server (8 % have been
    seen), and rightly says so. So each is held against what the server itself counted meanwhile. A tool that itself
    has to wait for a core reads late: what disagrees is measured again, and only the last time counts.
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
        found: dict[str, Said] = {}
        for attempt in range(ATTEMPTS):
            for name, tool in TOOLS.items():
                before = counters(url)
                figures, requests = tool(url, demo_model, folder / f"{name}-{attempt}")
                found[name] = Said(figures, since(before, counters(url), requests))
            if all(agree(ratio(what, found["ours"], found[other])) for what in WHAT for other in OTHER):
                break
    return found


def counters(url: str) -> dict[str, float]:
    """The server's sums and counts, by their names."""
    with urllib.request.urlopen(f"{url}/metrics", timeout=10) as answer:
        families = text_string_to_metric_families(answer.read().decode())
        return {sample.name: sample.value for family in families for sample in family.samples}


def since(before: dict[str, float], after: dict[str, float], requests: int) -> Figures:
    """What the server counted; its throughput is what the streams get without a pause between requests."""

    def mean(name: str) -> float:
        seconds, count = (after[f"vllm:{name}_{of}"] - before[f"vllm:{name}_{of}"] for of in ("sum", "count"))
        assert count == requests, "the server counted others than the tool"
        return seconds / count

    return Figures(
        mean("time_to_first_token_seconds"),
        mean("request_time_per_output_token_seconds"),
        STREAMS * TOKENS / mean("e2e_request_latency_seconds"),
    )


def run(command: list[str], folder: Path, name: str) -> None:
    folder.mkdir(exist_ok=True)
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(folder), "VLLM_NO_USAGE_STATS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, f"{name} ended with {done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"


def ours(url: str, model: Path, folder: Path) -> tuple[Figures, int]:
    command = [sys.executable, "-m", "loadtest", "--headless", "--only-summary"]
    command += ["--host", url, "--load-profile", str(folder.parent / "same.toml")]
    command += ["--records", str(folder), "--run-name", "ours"]
    run(command, folder, "loadtest")
    found = read(folder / "ours" / "records-0.jsonl").records
    assert {record.outcome for record in found} == {Outcome.OK}
    assert {record.completion_tokens for record in found} == {TOKENS}
    report = json.loads((folder / "ours" / "report.json").read_text())
    ttft, tpot = (float(np.mean([getattr(record, name) for record in found])) for name in ("ttft_s", "tpot_s"))
    return Figures(ttft, tpot, report["total"]["tokens_per_s"]), len(found)


def bench(url: str, model: Path, folder: Path) -> tuple[Figures, int]:
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
    assert said["output_lens"] == REQUESTS * [TOKENS]
    return Figures(said["mean_ttft_ms"] / 1e3, said["mean_tpot_ms"] / 1e3, said["output_throughput"]), REQUESTS


def guidellm(url: str, model: Path, folder: Path) -> tuple[Figures, int]:
    command = [str(OTHERS / "guidellm"), "run", "--disable-console"]
    command += ["--backend", f"kind=openai_http,target={url},model={served(url)},request_format=/v1/chat/completions"]
    command += ["--profile", f"kind=concurrent,streams={STREAMS}"]
    command += ["--constraint", f"kind=max_requests,count={REQUESTS}"]
    command += ["--tokenizer", f"kind=hf_auto,model={model}"]
    command += ["--data", f"kind=json_file,path={folder.parent / 'guidellm.jsonl'}"]
    command += ["--output", f"kind=json,path={folder / 'guidellm.json'}"]
    run(command, folder, "guidellm")
    [said] = json.loads((folder / "guidellm.json").read_text())["benchmarks"]
    requests = said["requests"]["successful"]
    assert [request["output_tokens"] for request in requests] == REQUESTS * [TOKENS]
    span = max(r["request_end_time"] for r in requests) - min(r["request_start_time"] for r in requests)
    # Its own time per output token holds the first token's wait; its time between tokens is what others call TPOT.
    ttft, tpot = (
        float(np.mean([request[f"{name}_ms"] for request in requests])) / 1e3
        for name in ("time_to_first_token", "inter_token_latency")
    )
    return Figures(ttft, tpot, REQUESTS * TOKENS / span), REQUESTS


TOOLS: dict[str, Tool] = {"bench": bench, "ours": ours, "guidellm": guidellm}


def served(url: str) -> str:
    """Name of the model."""
    with urllib.request.urlopen(f"{url}/v1/models", timeout=10) as answer:
        name: str = json.load(answer)["data"][0]["id"]
        return name


def ratio(what: str, mine: Said, theirs: Said) -> float:
    """Of two tools, each over the server they had."""
    return mine.of_the_servers(what) / theirs.of_the_servers(what)


def agree(found: float) -> bool:
    return abs(found - 1) <= TOLERANCE


@pytest.mark.parametrize("other", OTHER)
@pytest.mark.parametrize("what", WHAT)
def test_others_agree_within_five_per_cent(what: str, other: str, measured: dict[str, Said]) -> None:
    found = ratio(what, measured["ours"], measured[other])
    sys.stdout.write(f"{what}, ours / {other}: {found:.4f}; {measured['ours']}, {measured[other]}\n")
    assert agree(found)


@pytest.mark.parametrize("factor", [0.9, 1.1])
@pytest.mark.parametrize("what", WHAT)
def test_a_slower_server_is_no_disagreement_and_another_reading_of_it_is(what: str, factor: float) -> None:
    mine, slower = Figures(0.1, 0.02, 100.0), Figures(0.15, 0.03, 67.0)
    reading = replace(slower, **{what: factor * getattr(slower, what)})
    assert ratio(what, Said(mine, server=mine), Said(slower, server=slower)) == pytest.approx(1)
    assert not agree(ratio(what, Said(mine, server=mine), Said(reading, server=slower)))
