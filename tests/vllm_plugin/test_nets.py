"""The safety nets in vLLM: what requests may ask, the adapter for CPUs in an engine, and that for GPUs."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from vllm_plugin import inside_nets
from vllm_plugin.engine_process import Answer, EngineProcess, Question
from vqserve.format.errors import UsageError
from vqserve.reference import repetition as reference
from vqserve.settings import ANTI_REPETITION, AntiRepetition
from vqserve.vllm_plugin.counters import STEERED, THINKING_CLOSED, Counters, collector
from vqserve.vllm_plugin.repetition import LONGEST

ON_CPU = "vqserve.vllm_plugin.nets_cpu:SafetyNets"


def steered_by_step(answers: list[Answer], prompts: list[list[int]], setting: AntiRepetition) -> list[int]:
    """In how many answers the likeliest n-th token was penalised; asserts that the one taken is the likeliest then."""
    steered, changed = [0] * len(answers[0].logits), 0
    for answer, prompt in zip(answers, prompts, strict=True):
        out = answer.tokens[len(prompt) :]
        for n, (token, logits) in enumerate(zip(out, answer.logits, strict=True)):
            costs = reference.penalties(out[:n], **vars(setting), longest=LONGEST)
            steered[n] += costs.get(int(logits.argmax()), 0) > 0
            wanted = logits.clone()
            for other, cost in costs.items():
                wanted[other] -= cost
            assert wanted[token] == wanted.max()
            changed += token != int(logits.argmax())
    assert changed > 0
    return steered


@pytest.mark.slow
def test_a_request_overrides_the_server(engines: EngineProcess) -> None:
    def becomes(value: object, server: str | None = "0.5,64,2048") -> str:
        return str(engines.call(inside_nets.becomes, value, server))

    assert becomes(None) == str(AntiRepetition(0.5))
    assert becomes(None, None) == becomes(0) == becomes(0.0) == str(AntiRepetition(0.0))
    assert becomes(1) == becomes("1") == str(AntiRepetition(1.0))
    assert becomes("2,20") == str(AntiRepetition(2.0, 20))
    assert becomes("2,20,100") == str(AntiRepetition(2.0, 20, 100))
    for wrong in (-1, 101, True, "much", [1, 2], float("nan"), "1,0", "1,16,16"):
        assert "expected STRENGTH[,MIN_LENGTH[,WINDOW]]" in becomes(wrong)
        assert "0 turns it off" in becomes(wrong)
    assert "at most this server's, 2048" in becomes("1,16,4096")
    assert engines.call(inside_nets.budget_of, None) == 50
    assert engines.call(inside_nets.budget_of, 7) == 7


@pytest.mark.slow
def test_an_engine_picks_the_token_that_is_likeliest_after_the_penalty(
    random_checkpoint: Path, prompts: list[list[int]]
) -> None:
    setting = AntiRepetition(3.0, 3, 60)
    engines = EngineProcess(**{ANTI_REPETITION: "3,3,60", "VLLM_ALLOW_INSECURE_SERIALIZATION": "1"})
    try:
        question = Question(
            random_checkpoint,
            prompts,
            generate=80,
            inspect=inside_nets.counted,
            options={"logits_processors": [ON_CPU]},
        )
        answers, counted = engines.ask(question)
    finally:
        engines.stop()
    assert counted[STEERED] == sum(steered_by_step(answers, prompts, setting))


@pytest.mark.slow
@pytest.mark.parametrize("drafts", [0, 3])
def test_the_adapter_for_gpus_penalises_as_the_definition_says(drafts: int, engines: EngineProcess, seed: int) -> None:
    draw = random.Random(seed)
    outputs = []
    for _ in range(12):
        loop = draw.choices(range(3, 20), k=draw.randint(1, 9))
        out = draw.choices(range(3, 20), k=draw.randint(4, 60)) + loop * draw.randint(1, 30)
        outputs.append((draw.choices(range(3, 20), k=draw.randint(1, 40)), out[:300]))
    costs, _ = engines.call(inside_nets.gpu_nets, "0.7,4,100", outputs, drafts, [None] * len(outputs))
    row = 0
    for _, out in outputs:
        for n in range(len(out) - drafts, len(out) + 1):
            found = reference.penalties(out[:n], strength=0.7, min_length=4, window=100, longest=LONGEST)
            wanted = torch.tensor([found.get(token, 0.0) for token in range(20)])
            torch.testing.assert_close(costs[row], wanted)
            row += 1


@pytest.mark.slow
def test_the_adapter_for_gpus_counts_thinking_that_its_budget_closes(engines: EngineProcess) -> None:
    opened = ([5, inside_nets.START], [6] * 10)
    outputs = [
        opened,
        opened,
        ([5, inside_nets.START], [6] * 9 + [inside_nets.END]),
        ([5], [inside_nets.START, *[6] * 10]),
        ([5], [6] * 10),
        opened,
    ]
    _, counted = engines.call(inside_nets.gpu_nets, "0", outputs, 0, [10, 11, 10, 10, 10, None])
    assert counted[THINKING_CLOSED] == 2


@pytest.fixture
def counters_path(tmp_path: Path) -> str:
    path = tmp_path / "counters"
    path.write_bytes(bytes(4096))
    return str(path)


def test_counters_reach_prometheus(counters_path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert collector("glm") is None
    monkeypatch.setenv("VQSERVE_COUNTERS", counters_path)
    Counters(1).add(STEERED, 3)
    Counters(0).add(THINKING_CLOSED, 1)
    Counters(0, "").add(THINKING_CLOSED, 100)  # a rank that nobody listens to
    found = collector("glm", [0, 1])
    assert found is not None
    samples = {(s.name, s.labels["engine"]): s.value for family in found.collect() for s in family.samples}
    assert samples == {
        ("vqserve_thinking_closed_total", "0"): 1,
        ("vqserve_thinking_closed_total", "1"): 0,
        ("vqserve_anti_repetition_tokens_total", "0"): 0,
        ("vqserve_anti_repetition_tokens_total", "1"): 3,
    }


def test_counters_that_cannot_be_are_refused(counters_path: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no room for engine 256"):
        Counters(256, counters_path)
    with pytest.raises(UsageError, match="unset it to count nothing"):
        Counters(0, str(tmp_path / "nowhere"))
