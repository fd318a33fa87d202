"""Two ranks hold half of the experts' bytes each, and together compute what one computes.

Engines on two ranks take long to start, so the weights are served on one. The tolerances are those of one rank:
splitting a sum over ranks is one more change of its order. Measured in fp32: 1e-4 either parent against transformers,
1e-5 codes against weights, over gloo as in shared memory.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest

from random_checkpoint import make_random_checkpoint
from random_parent import make_random_parent
from vllm_plugin import inside
from vllm_plugin.engine_process import HAS_4_BIT_GEMM, Answer, EngineError, EngineProcess, Question
from vllm_plugin.test_logits import FP32, HALF, by_transformers, difference, served

TWO = {"tensor_parallel_size": 2}
WHOLE = {**TWO, "enable_expert_parallel": True}
PLANES = ("codes", "refinement", "scales")

pytestmark = pytest.mark.slow


def test_the_trained_parent_on_two_ranks_has_the_logits_of_transformers(
    engines_of_two_ranks: EngineProcess, demo_parent: Path, sums_to_do: list[list[int]]
) -> None:
    for answer in engines_of_two_ranks.ask(Question(demo_parent, sums_to_do, generate=24, options=TWO))[0]:
        assert (served(answer) - by_transformers(demo_parent, answer.tokens)).abs().max() < FP32


def test_two_ranks_share_every_plane_and_have_the_logits_of_the_weights(
    engines_of_two_ranks: EngineProcess, experts_only: Path, plain_answers: list[Answer], prompts: list[list[int]]
) -> None:
    ours, held = engines_of_two_ranks.ask(Question(experts_only, prompts, inspect=inside.held_bytes, options=TWO))
    assert difference(ours, plain_answers) < FP32
    stored = inside.stored_bytes(experts_only)
    assert set(stored) == set(PLANES)
    assert held == [{part: size // 2 for part, size in stored.items()}] * 2


def test_two_ranks_over_gloo_have_the_logits_of_transformers_and_of_the_weights(
    engines_without_avx512: EngineProcess,
    random_parent: Path,
    experts_only: Path,
    plain_answers: list[Answer],
    prompts: list[list[int]],
) -> None:
    # With AVX-512 vLLM sums over ranks in shared memory, by operators that its other library has not.
    parents, used = engines_without_avx512.ask(
        Question(random_parent, prompts, inspect=inside.collectives, options=TWO)
    )
    assert used == ["gloo", "gloo"]
    for answer in parents:
        assert (served(answer) - by_transformers(random_parent, answer.tokens)).abs().max() < FP32
    ours, _ = engines_without_avx512.ask(Question(experts_only, prompts, options=TWO))
    assert difference(ours, plain_answers) < FP32


def test_two_ranks_share_the_planes_and_the_4_bit_spine_and_have_the_logits_of_its_weights(
    engines_of_two_ranks: EngineProcess,
    engines: EngineProcess,
    unrouted: Path,
    unrouted_plain: Path,
    prompts: list[list[int]],
) -> None:
    question = Question(unrouted, prompts, "bfloat16", inspect=inside.held_bytes, options=TWO)
    ours, held = engines_of_two_ranks.ask(question)
    theirs, _ = engines.ask(Question(unrouted_plain, prompts, "bfloat16"))
    assert difference(ours, theirs) < HALF["bfloat16"]
    stored = inside.stored_bytes(unrouted)
    # vLLM splits nothing of the query and key compressions, whose outputs every head needs.
    whole = "spine of every rank"
    expected = {part: stored[part] // 2 for part in PLANES}
    if HAS_4_BIT_GEMM:
        expected |= {"spine": stored["spine"] // 2, whole: stored[whole]}
    assert held == [expected, expected]


def test_ranks_with_half_of_the_experts_each_have_the_logits_of_one_rank(
    engines_of_two_ranks: EngineProcess, experts_only: Path, plain_answers: list[Answer], prompts: list[list[int]]
) -> None:
    # vLLM's own unquantized experts crash on CPUs in this mode: the weights are served on one rank.
    question = Question(experts_only, prompts, inspect=inside.held_bytes, options=WHOLE)
    answers, held = engines_of_two_ranks.ask(question)
    assert difference(answers, plain_answers) < FP32
    assert held == [inside.stored_bytes(experts_only, half) for half in (range(8), range(8, 16))]
    assert held[0] != held[1], "their experts' tiers differ"


def test_ranks_with_whole_experts_and_a_shared_4_bit_spine_have_the_logits_of_one(
    engines_of_two_ranks: EngineProcess, engines: EngineProcess, unrouted: Path, prompts: list[list[int]]
) -> None:
    ours, _ = engines_of_two_ranks.ask(Question(unrouted, prompts, "float16", options=WHOLE))
    theirs, _ = engines.ask(Question(unrouted, prompts, "float16"))
    assert difference(ours, theirs) < HALF["float16"]


@pytest.mark.parametrize(
    ("sizes", "options", "reason"),
    [
        (
            {"moe_intermediate_size": 128, "n_shared_experts": 2},
            TWO,
            "moe_intermediate_size = 128 does not split into 2 parts of whole groups of 128 columns; use 1",
        ),
        (
            {"moe_intermediate_size": 128},
            WHOLE,
            "model.layers.1.mlp.shared_experts.down_proj has 128 columns, which do not split into 2 parts",
        ),
        ({}, {"tensor_parallel_size": 3}, "Total number of attention heads (2) must be divisible"),
    ],
)
def test_vllm_without_vqserve_serve_refuses_ranks_that_cannot_share_the_model(
    sizes: dict[str, int], options: dict[str, Any], reason: str, engines: EngineProcess, tmp_path: Path
) -> None:
    parent = make_random_parent(tmp_path / "parent", num_hidden_layers=2, **sizes)
    checkpoint = make_random_checkpoint(parent, tmp_path / "checkpoint")
    with pytest.raises(EngineError) as error:
        engines.call(partial(inside.load, checkpoint, inside.unchanged, **options))
    assert reason in str(error.value)
