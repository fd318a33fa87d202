"""A parent of another geometry than the demo's, from its weights to the answers of its server.

Other numbers of dense layers, heads and experts, head dimensions, widths, vocabulary and rotation; a layer that shares
its indexer, two shared experts in one, and a multi-token-prediction layer, which is left out of the result.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from e2e.conftest import Server, serving, wait_for
from encode.mortal import FEW_VECTORS
from random_parent import make_random_parent
from vqserve.cli import main
from vqserve.encode import steps
from vqserve.format.files import check_checkpoint, read_tensors
from vqserve.format.names import layer_of
from whole_model import load_model

pytestmark = pytest.mark.e2e

VOCABULARY = 400
FOREIGN: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "intermediate_size": 384,
    "moe_intermediate_size": 128,
    "first_k_dense_replace": 2,
    "num_attention_heads": 4,
    "qk_nope_head_dim": 128,
    "v_head_dim": 128,
    "q_lora_rank": 256,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_shared_experts": 2,
    "routed_scaling_factor": 1.5,
    "rope_parameters": {"rope_theta": 1e6, "rope_type": "default"},
    "index_n_heads": 2,
    "indexer_types": ["full", "full", "shared", "full"],
    "num_nextn_predict_layers": 1,
    "max_position_embeddings": 1024,
}
TOP = 20
"""Log-probabilities per token that the server gives at most."""
BF16 = 0.2
"""Difference of log-probabilities between the server, in bf16, and transformers, in fp32: of the largest at each token
the median. Measured: 0.07; against the parent's own weights 3.5."""


@pytest.fixture(scope="module")
def parent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_random_parent(tmp_path_factory.mktemp("foreign") / "parent", files=3, **FOREIGN)


@pytest.fixture(scope="module")
def checkpoint(parent: Path) -> Path:
    rng, calibration = random.Random(0), parent.parent / "calibration.jsonl"
    lines = [" ".join(str(rng.randrange(10**6)) for _ in range(30)) for _ in range(30)]
    calibration.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines), encoding="utf-8")
    folder = parent.parent / "checkpoint"
    options = ["--bits", "2.25", "--calibration", str(calibration), "--quiet"]
    with patch.object(steps, "CODEBOOK_VECTORS", FEW_VECTORS):
        assert main(["encode", str(parent), str(folder), *options]) == 0
    return folder


@pytest.fixture(scope="module")
def server(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(checkpoint, tmp_path_factory.mktemp("server")) as started:
        wait_for(started, "/health", 200)
        yield started


def test_all_of_the_parent_but_its_prediction_layer_is_there(parent: Path, checkpoint: Path) -> None:
    found, stored = check_checkpoint(checkpoint), read_tensors(parent)
    assert found.config["num_nextn_predict_layers"] == 0
    assert {layer_of(name) for name in stored} - {layer_of(name) for name in found.tensors} == {4}
    assert not any(name.startswith("model.layers.2.self_attn.indexer") for name in found.tensors)
    assert [module.name for module in found.quant.modules] == [f"model.layers.{n}.mlp.experts" for n in (2, 3)]


def test_it_answers_as_the_weights_it_stands_for(parent: Path, checkpoint: Path, server: Server, seed: int) -> None:
    rng = random.Random(seed)
    prompts = [[rng.randrange(VOCABULARY) for _ in range(length)] for length in (100, 40)]
    answer = server.client.completions.create(
        model="glm-5.2", prompt=prompts, max_tokens=1, temperature=0, extra_body={"prompt_logprobs": TOP}
    )
    plain, original = load_model(checkpoint), load_model(parent)
    near: list[float] = []
    far: list[float] = []
    for prompt, choice in zip(prompts, answer.choices, strict=True):
        given = choice.model_extra["prompt_logprobs"][1:] if choice.model_extra else []
        assert len(given) == len(prompt) - 1
        for model, differences in ((plain, near), (original, far)):
            wanted = log_probabilities(model, prompt)
            for at, tokens in enumerate(given):
                errors = [abs(found["logprob"] - float(wanted[at, int(token)])) for token, found in tokens.items()]
                differences.append(max(errors))
    # Rounding swaps two experts of almost equal rank at one token or another, so not the largest of all.
    assert torch.tensor(near).median() < BF16
    assert torch.tensor(far).median() > 5 * BF16, "the comparison would see other weights"


@torch.no_grad()
def log_probabilities(model: torch.nn.Module, prompt: list[int]) -> Tensor:
    """float32 `[tokens, vocabulary]`."""
    logits: Tensor = model(input_ids=torch.tensor([prompt])).logits[0]
    return logits.log_softmax(-1)
