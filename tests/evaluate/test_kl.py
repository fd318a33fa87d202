from __future__ import annotations

import random
import shutil
from pathlib import Path

import pytest
import torch

from random_checkpoint import read_tensors
from random_parent import make_random_parent, write_weights
from vqserve.evaluate.kl import Sample, divergence
from vqserve.format.errors import TensorError, UsageError
from vqserve.format.files import check_checkpoint
from vqserve.model.weights import DequantizedModel, open_model, open_tokenizer
from whole_model import load_model


@pytest.fixture
def samples(seed: int) -> list[Sample]:
    rng = random.Random(seed)
    words = ["one ", "two, ", "drei ", "四 ", "five "]
    return [
        Sample(rng.choice("xy"), "".join(rng.choices(words, k=rng.randint(1, 12))), "".join(rng.choices(words, k=3)))
        for _ in range(9)
    ]


def test_a_checkpoint_loads_as_exactly_its_dequantized_weights(
    random_checkpoint: Path, dequantized_checkpoint: Path
) -> None:
    found = DequantizedModel(check_checkpoint(random_checkpoint))
    expected = read_tensors(dequantized_checkpoint)
    assert set(found.names) == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found.tensor(name).to(tensor.dtype), tensor), name


@pytest.mark.parametrize("leaf", ["self_attn.o_proj", "mlp.experts.5.up_proj"])
def test_an_unquantized_checkpoint_that_lacks_a_tensor_is_refused_by_name(
    leaf: str, random_parent: Path, tmp_path: Path
) -> None:
    folder, tensors = shutil.copytree(random_parent, tmp_path / "parent"), read_tensors(random_parent)
    del tensors[f"model.layers.2.{leaf}.weight"]
    write_weights(folder, tensors, 2)
    with pytest.raises(TensorError, match=rf"^model\.layers\.2\.{leaf}\.weight: missing: no file holds it"):
        open_model(folder)


def test_a_model_does_not_diverge_from_itself(random_parent: Path, samples: list[Sample]) -> None:
    model = open_model(random_parent)
    for result in divergence(model, model, open_tokenizer(random_parent), samples).values():
        assert result.mean == result.p99 == 0.0
        assert result.top1 == 1.0


def test_the_divergence_is_that_of_one_text_at_a_time(
    random_parent: Path, random_checkpoint: Path, samples: list[Sample]
) -> None:
    parent, model, tokenizer = load_model(random_parent), load_model(random_checkpoint), open_tokenizer(random_parent)
    values: dict[str, list[torch.Tensor]] = {}
    for sample in samples:
        prompt, answer = (
            tokenizer(t, add_special_tokens=False)["input_ids"] for t in (sample.prompt, sample.completion)
        )
        with torch.no_grad():
            p, q = (m(input_ids=torch.tensor([prompt + answer])).logits[0].double() for m in (parent, model))
        at = slice(len(prompt) - 1, len(prompt) + len(answer) - 1)
        p, q = p.log_softmax(-1)[at], q.log_softmax(-1)[at]
        kl = torch.nn.functional.kl_div(q, p, reduction="none", log_target=True).sum(-1)
        for stratum in ("all", sample.stratum):
            values.setdefault(stratum, []).append(kl)
    found = divergence(open_model(random_parent), open_model(random_checkpoint), tokenizer, samples)
    assert found.keys() == values.keys()
    for stratum, parts in values.items():
        every = torch.cat(parts)
        assert found[stratum].tokens == len(every)
        assert found[stratum].mean == pytest.approx(every.mean().item(), rel=1e-4)
        assert found[stratum].median == pytest.approx(every.quantile(0.5).item(), rel=1e-4)
        assert found[stratum].low <= found[stratum].mean <= found[stratum].high
        assert found[stratum].mean > 0.01


def test_a_text_beyond_what_sparse_attention_selects_whole_is_refused(random_parent: Path) -> None:
    model = open_model(random_parent)
    with pytest.raises(UsageError, match="text 2 has 2049 tokens; give texts of at most 2048"):
        divergence(
            model, model, open_tokenizer(random_parent), [Sample("x", "a", "b"), Sample("x", "a" * 2000, "b" * 49)]
        )


def test_models_that_are_not_of_a_kind_are_refused(random_parent: Path, tmp_path: Path) -> None:
    other = make_random_parent(tmp_path / "other", num_hidden_layers=2, n_routed_experts=4)
    with pytest.raises(UsageError, match="give a checkpoint and its own parent"):
        divergence(open_model(random_parent), open_model(other), open_tokenizer(other), [Sample("x", "a", "b")])
