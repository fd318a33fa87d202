"""What the encoder claims, measured on the demo's trained parent and printed.

Experts only, the spine as it is; KL to the parent on held-out sums and on facts of the almanac. All variants share
codebooks, statistics and bytes; only the ablated step differs.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import GlmMoeDsaForCausalLM

from data import answer_text, prompt_text
from vqserve.encode import steps
from vqserve.encode.assign import factorize
from vqserve.encode.calibration import read_calibration
from vqserve.encode.experts import Problem
from vqserve.encode.parent import Parent
from vqserve.encode.steps import Job
from vqserve.encode.vq import REFITS, encode_matrices
from vqserve.encode.work import Work
from vqserve.evaluate import almanac, sums
from vqserve.evaluate.items import LANGUAGES
from vqserve.evaluate.kl import Divergence, Sample, divergence
from vqserve.evaluate.load import load_model, load_tokenizer
from vqserve.format.tiers import TIERS

PER_LANGUAGE = 60

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

Measure = Callable[..., Divergence]


@pytest.fixture(scope="module")
def job(demo_parent: Path, tmp_path_factory: pytest.TempPathFactory) -> Job:
    """The demo's parent with all statistics and codebooks gathered."""
    parent = Parent(demo_parent)
    tokens = read_calibration(demo_parent.with_name("calibration.jsonl"), parent.tokenizer(), longest=2048, seed=0)
    job = Job(parent, tokens, Work(tmp_path_factory.mktemp("claims") / "work", {}), torch.device("cpu"), seed=0)
    for layer in range(parent.geometry.num_hidden_layers):
        steps.survey(job, layer)
    for layer in reversed(parent.geometry.moe_layers):
        steps.gradient(job, layer)
    with ThreadPoolExecutor(2, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        list(pool.map(lambda d: steps.codebooks(job, d), steps.WIDTHS))
    return job


@pytest.fixture(scope="module")
def measure(job: Job) -> Measure:
    """Encodes all experts in one tier and measures the KL divergence from the parent."""
    problems = [(layer, chunk, steps.state_problem(job, layer, chunk)) for layer, chunk in job.chunks]
    original, model = load_model(job.parent.folder), load_model(job.parent.folder)
    tokenizer, samples = load_tokenizer(job.parent.folder), draw_samples()
    codebooks = steps.load_codebooks(job.work)

    def encode(problem: Problem, proj: str, letter: str, refits: int, euclidean: bool, order: bool) -> Tensor:
        factor = factorize(problem.hessians[proj], TIERS[letter].d, order=order)
        encoded = encode_matrices(
            problem.weights[proj],
            problem.hessians[proj],
            factor,
            codebooks[letter],
            refits=refits,
            euclidean=euclidean,
        )
        return encoded.dequantize(codebooks[letter])

    def result(letter: str, *, refits: int = REFITS, euclidean: bool = False, order: bool = True) -> Divergence:
        for layer, chunk, problem in problems:
            found = {proj: encode(problem, proj, letter, refits, euclidean, order) for proj in problem.weights}
            put(model, layer, chunk, found)
        return divergence(original, model, tokenizer, samples)["all"]

    return result


def draw_samples() -> list[Sample]:
    rng, samples = random.Random("claims"), []
    for language in LANGUAGES:
        for i in range(PER_LANGUAGE):
            fact, thinking = i % 2 == 0, i % 4 < 2
            item = almanac.sample(rng, language=language) if fact else sums.sample(rng, test=True, language=language)
            samples.append(Sample(language, prompt_text(item, thinking=thinking), answer_text(item, thinking=thinking)))
    return samples


def put(model: GlmMoeDsaForCausalLM, layer: int, experts: range, weights: dict[str, Tensor]) -> None:
    """Replaces the weights of some experts of a layer."""
    module = model.get_submodule(f"model.layers.{layer}.mlp.experts")
    chosen = slice(experts.start, experts.stop)
    module.get_parameter("gate_up_proj").data[chosen] = torch.cat([weights["gate_proj"], weights["up_proj"]], dim=1)
    module.get_parameter("down_proj").data[chosen] = weights["down_proj"]


def show(capsys: pytest.CaptureFixture[str], bits: float, rows: dict[str, Divergence]) -> None:
    with capsys.disabled():
        for name, row in rows.items():
            interval = f"{row.low:.4f} - {row.high:.4f}"
            print(f"\n{bits:g} bit, {name}: KL {row.mean:.4f} ({interval}), same first {row.top1:.1%}", end="")  # noqa: T201


def test_divergence_is_lower_than_euclidean_gptq_vq_and_the_refit_is_worth_a_third_at_one_bit(
    measure: Measure, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = {
        "Euclidean GPTQ-VQ": measure("a", refits=0, euclidean=True, order=False),
        "metric and order": measure("a", refits=0),
        "metric, order and scale refit": measure("a"),
    }
    show(capsys, 1, rows)
    euclidean, plain, ours = (row.mean for row in rows.values())
    assert ours < euclidean
    assert ours < plain * 2 / 3


def test_divergence_is_lower_than_euclidean_gptq_vq_at_two_bit(
    measure: Measure, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = {
        "Euclidean GPTQ-VQ": measure("c", refits=0, euclidean=True, order=False),
        "metric, order and scale refit": measure("c"),
    }
    show(capsys, 2, rows)
    euclidean, ours = (row.mean for row in rows.values())
    assert ours < euclidean
