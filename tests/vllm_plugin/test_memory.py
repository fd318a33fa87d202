"""What `format.memory` says a CPU server holds, against what a running vLLM holds.

Measured on an EPYC with AVX-512, in bytes, estimate and vLLM: one rank 7,397,680 and 7,397,776 in bfloat16, 21,595,952
and 21,596,048 in float32; each of two 4,170,544 and 4,170,640, 12,795,696 and 12,795,792. The 96 bytes are scales of
attention, 24 per layer. KV cache per token is exact.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from vllm_plugin import inside
from vllm_plugin.engine_process import HAS_4_BIT_GEMM, EngineProcess, Question
from vqserve.format.memory import Memory, memory

TOLERANCE = 0.01
GIB = 1 << 30
TWO = {"tensor_parallel_size": 2}
WHOLE = {**TWO, "enable_expert_parallel": True}


def estimate(folder: Path, dtype: str, options: dict[str, Any], avx512: bool = True) -> Memory:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    avx512 = avx512 and HAS_4_BIT_GEMM
    return memory(
        config,
        ranks=options.get("tensor_parallel_size", 1),
        platform="cpu",
        whole_experts="enable_expert_parallel" in options,
        dequantized_spine=not avx512 or dtype == "float32",
        avx512=avx512,
        element_bytes=4 if dtype == "float32" else 2,
    )


def check(process: EngineProcess, folder: Path, dtype: str, options: dict[str, Any], avx512: bool = True) -> None:
    """Serves a checkpoint and compares each rank's bytes with the estimate."""
    whole_cache = {**options, "num_gpu_blocks_override": None}
    question = Question(folder, [[30, 31, 32]], dtype, generate=1, inspect=inside.memory_of_ranks, options=whole_cache)
    _, ranks = process.ask(question)
    wanted = estimate(folder, dtype, options, avx512)
    assert len(ranks) == wanted.ranks
    assert max(weights for weights, _, _ in ranks) == pytest.approx(wanted.weights.total, rel=TOLERANCE)
    for _, per_token, cached in ranks:
        assert per_token == wanted.token_bytes
        assert cached == pytest.approx(GIB, rel=TOLERANCE), "every rank has a cache of VLLM_CPU_KVCACHE_SPACE"


# bfloat16 on the demo, which has what an encoder chose; float32 on a checkpoint of random codes.
MODELS = pytest.mark.parametrize(("model", "dtype"), [("demo_model", "bfloat16"), ("unrouted", "float32")])


@MODELS
def test_one_rank_holds_what_the_estimate_says(
    engines: EngineProcess, model: str, dtype: str, request: pytest.FixtureRequest
) -> None:
    check(engines, request.getfixturevalue(model), dtype, {})


@pytest.mark.slow
@MODELS
def test_each_of_two_ranks_holds_what_the_estimate_says(
    engines_of_two_ranks: EngineProcess, model: str, dtype: str, request: pytest.FixtureRequest
) -> None:
    check(engines_of_two_ranks, request.getfixturevalue(model), dtype, TWO)


@pytest.mark.slow
def test_the_fuller_of_two_ranks_with_whole_experts_holds_what_the_estimate_says(
    engines_of_two_ranks: EngineProcess, random_checkpoint: Path
) -> None:
    check(engines_of_two_ranks, random_checkpoint, "bfloat16", WHOLE)


def test_the_unquantized_parent_holds_what_the_estimate_says(engines: EngineProcess, random_parent: Path) -> None:
    check(engines, random_parent, "float32", {})


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_cpu_without_avx512_holds_what_the_estimate_says(
    engines_without_avx512: EngineProcess, unrouted: Path, dtype: str
) -> None:
    check(engines_without_avx512, unrouted, dtype, {}, avx512=False)
