"""What a served model tells Prometheus: vLLM's metrics and ours, after requests of known kinds."""

from __future__ import annotations

from pathlib import Path

import openai
import pytest

from e2e.conftest import Samples, Server, scraped, wait_for
from vqserve.format.files import read_config

pytestmark = pytest.mark.e2e

MODEL = "glm-5.2"


def grown(before: Samples, after: Samples, name: str) -> dict[str, float]:
    return {labels: value - before[name][labels] for labels, value in after[name].items()}


def ask(server: Server, text: str, max_tokens: int | None = None) -> str | None:
    answer = server.client.chat.completions.create(
        model=MODEL, messages=[{"role": "user", "content": text}], max_tokens=max_tokens
    )
    return answer.choices[0].finish_reason


def test_every_way_a_request_can_end_is_counted_as_what_it_was(server: Server, demo_model: Path) -> None:
    limit = read_config(demo_model)["max_position_embeddings"]
    wait_for(server, "/ready", 200)
    before = scraped(server)
    assert ask(server, "12 + 34 = ?") == "stop"
    assert ask(server, "12 + 34 = ?", 4) == "length"
    with pytest.raises(openai.BadRequestError, match="maximum context length"):
        ask(server, "12 + 34 = ? " * limit)
    with pytest.raises(openai.BadRequestError):
        ask(server, "12 + 34 = ?", 2 * limit)
    with pytest.raises(openai.BadRequestError):
        server.client.completions.create(model=MODEL, prompt=[20] * (limit + 1), max_tokens=1)
    with pytest.raises(openai.BadRequestError, match="temperature"):
        server.client.completions.create(model=MODEL, prompt="1", temperature=-1)
    completion = server.client.completions.create(
        model=MODEL, prompt=[20] * (limit - 8), max_tokens=8, extra_body={"ignore_eos": True}
    )
    assert completion.choices[0].finish_reason == "length"
    after = scraped(server)
    ended = {"stop": 1, "max_tokens": 1, "context_limit": 1, "abort": 0, "error": 0, "repetition": 0}
    assert grown(before, after, "vqserve_finished_requests_total") == ended
    assert grown(before, after, "vqserve_refused_requests_total") == {"context_limit": 3, "invalid": 1, "stopping": 0}
    shares = grown(before, after, "vqserve_context_share_bucket")
    assert (shares["0.9"], shares["+Inf"]) == (2, 3)
    assert after["vqserve_context_limit_tokens"][""] == limit
    assert after["vqserve_kv_cache_capacity_tokens"][""] >= 4 * limit
    assert grown(before, after, "vqserve_stream_tokens_per_second_count")["1"] >= 10


def test_an_idle_server_is_ready_silent_for_no_time_and_has_told_its_start(server: Server) -> None:
    wait_for(server, "/ready", 200)
    now = scraped(server)
    assert {status for status, value in now["vqserve_server_status"].items() if value} == {"ready"}
    assert now["vqserve_seconds_since_last_token"][""] == 0
    phases = now["vqserve_startup_seconds"]
    assert phases.keys() == {"engine", "server", "warm_up"}
    assert all(value > 0 for value in phases.values())
    assert now["vqserve_weights_bytes"]["experts: 2 bit,0"] > 0


def test_token_histograms_of_vllm_reach_up_to_the_context(server: Server, demo_model: Path) -> None:
    bounds = scraped(server)["vllm:request_prompt_tokens_bucket"].keys() - {"+Inf"}
    assert max(map(float, bounds)) == read_config(demo_model)["max_position_embeddings"]
    assert len(bounds) > 12
