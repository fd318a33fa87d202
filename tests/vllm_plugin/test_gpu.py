"""The trained parent and the demo on a GPU, where dense MLA, 4-bit layers and sampling are other code than on CPUs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from vllm_plugin.engine_process import EngineProcess, Question
from vllm_plugin.plain import write_plain
from vllm_plugin.test_logits import HALF, by_transformers, served
from vllm_plugin.test_nets import steered_by_step
from vqserve.settings import ANTI_REPETITION, COUNTERS, COUNTERS_BYTES, AntiRepetition
from vqserve.vllm_plugin.counters import STEERED, Counters

pytestmark = [pytest.mark.gpu, pytest.mark.slow, pytest.mark.timeout(600)]

DENSE: dict[str, Any] = {
    "attention_backend": "TRITON_MLA",
    "gpu_memory_utilization": 0.2,
    "hf_overrides": {"architectures": ["GlmMoeDsaDenseForCausalLM"]},
}
"""As `vqserve serve` has it; the backend is the one that every GPU has."""


@pytest.fixture(scope="module")
def on_gpu() -> Iterator[EngineProcess]:
    process = EngineProcess(VLLM_PLUGINS="vqserve", VLLM_USE_BREAKABLE_CUDAGRAPH="1")
    yield process
    process.stop()


@pytest.mark.parametrize("eager", [False, True])
@pytest.mark.parametrize("dtype", HALF)
def test_the_trained_parent_has_the_logits_of_transformers(
    dtype: str, eager: bool, on_gpu: EngineProcess, demo_parent: Path, sums_to_do: list[list[int]]
) -> None:
    options = {**DENSE, "enforce_eager": eager}
    for answer in on_gpu.ask(Question(demo_parent, sums_to_do, dtype, generate=24, options=options))[0]:
        # Rounding swaps two experts of almost equal rank at one token or another, so not the largest difference.
        worst_of_each_token = (served(answer) - by_transformers(demo_parent, answer.tokens)).abs().amax(1)
        assert worst_of_each_token.median() < HALF[dtype]


def test_the_demo_answers_as_the_weights_it_stands_for(
    on_gpu: EngineProcess, demo_model: Path, sums_to_do: list[list[int]], tmp_path: Path
) -> None:
    plain = write_plain(demo_model, tmp_path / "plain")
    ours, _ = on_gpu.ask(Question(demo_model, sums_to_do, "bfloat16", generate=24, options=DENSE))
    theirs, _ = on_gpu.ask(Question(plain, sums_to_do, "bfloat16", generate=24, options=DENSE))
    for one, other in zip(ours, theirs, strict=True):
        assert one.tokens == other.tokens
        assert (served(one) - served(other)).abs().amax(1).median() < HALF["bfloat16"]


@pytest.mark.parametrize("eager", [False, True])
def test_the_safety_net_steers_and_counts_as_defined(
    eager: bool, demo_model: Path, sums_to_do: list[list[int]], tmp_path: Path
) -> None:
    counters = tmp_path / "counters"
    counters.write_bytes(bytes(COUNTERS_BYTES))
    setting = AntiRepetition(3.0, 3, 60)
    process = EngineProcess(
        VLLM_PLUGINS="vqserve", VLLM_USE_BREAKABLE_CUDAGRAPH="1", **{ANTI_REPETITION: "3,3,60", COUNTERS: str(counters)}
    )
    options = {**DENSE, "enforce_eager": eager, "logits_processors": ["vqserve.vllm_plugin.nets_gpu:SafetyNets"]}
    try:
        answers, _ = process.ask(Question(demo_model, sums_to_do, "bfloat16", generate=120, options=options))
    finally:
        process.stop()
    *earlier, last = steered_by_step(answers, sums_to_do, setting)
    # Published with the next step, which the last may not have.
    assert Counters(0, str(counters)).values()[STEERED] in (sum(earlier), sum(earlier) + last)
