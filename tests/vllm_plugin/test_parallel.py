"""Two ranks hold half of the experts' bytes each, and together compute what one computes."""

from __future__ import annotations

from pathlib import Path

import pytest

from vllm_plugin import inside
from vllm_plugin.engine_process import Answer, EngineProcess, Question
from vllm_plugin.test_logits import FP32, HALF, by_transformers, difference, served

TWO = {"tensor_parallel_size": 2}


@pytest.mark.slow
def test_the_parent_on_two_ranks_has_the_logits_of_transformers(
    engines_of_two_ranks: EngineProcess, random_parent: Path, prompts: list[list[int]]
) -> None:
    for answer in engines_of_two_ranks.ask(Question(random_parent, prompts, options=TWO))[0]:
        assert (served(answer) - by_transformers(random_parent, answer.tokens)).abs().max() < FP32


@pytest.mark.slow
def test_two_ranks_share_the_codes_and_have_the_logits_of_one(
    engines_of_two_ranks: EngineProcess, experts_only: Path, plain_answers: list[Answer], prompts: list[list[int]]
) -> None:
    question = Question(experts_only, prompts, inspect=inside.bytes_of_experts, options=TWO)
    answers, held = engines_of_two_ranks.ask(question)
    assert difference(answers, plain_answers) < FP32
    assert held == [inside.bytes_of_planes(experts_only) // 2] * 2


@pytest.mark.slow
def test_ranks_with_whole_experts_and_a_shared_4_bit_spine_have_the_logits_of_one(
    engines_of_two_ranks: EngineProcess, engines: EngineProcess, unrouted: Path, prompts: list[list[int]]
) -> None:
    options = {**TWO, "enable_expert_parallel": True}
    ours, _ = engines_of_two_ranks.ask(Question(unrouted, prompts, "float16", options=options))
    theirs, _ = engines.ask(Question(unrouted, prompts, "float16"))
    assert difference(ours, theirs) < HALF["float16"]
