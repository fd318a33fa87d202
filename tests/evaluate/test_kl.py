from __future__ import annotations

import random
import shutil
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

from random_checkpoint import read_tensors
from random_parent import write_weights
from vqserve.evaluate.kl import Sample, divergence
from vqserve.evaluate.load import dequantized, load_model, load_tokenizer
from vqserve.format.errors import TensorError
from vqserve.format.files import check_checkpoint


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
    found: Mapping[str, torch.Tensor] = dict(dequantized(check_checkpoint(random_checkpoint)))
    expected = read_tensors(dequantized_checkpoint)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name].to(tensor.dtype), tensor), name


@pytest.mark.parametrize("leaf", ["self_attn.o_proj", "mlp.experts.5.up_proj"])
def test_an_unquantized_checkpoint_that_lacks_a_tensor_is_refused_by_name(
    leaf: str, random_parent: Path, tmp_path: Path
) -> None:
    folder, tensors = shutil.copytree(random_parent, tmp_path / "parent"), read_tensors(random_parent)
    del tensors[f"model.layers.2.{leaf}.weight"]
    write_weights(folder, tensors, 2)
    with pytest.raises(TensorError, match=rf"^model\.layers\.2\.{leaf}\.weight: missing: no file holds it"):
        load_model(folder)


def test_a_model_does_not_diverge_from_itself(random_parent: Path, samples: list[Sample]) -> None:
    model = load_model(random_parent)
    for result in divergence(model, model, load_tokenizer(random_parent), samples).values():
        assert result.mean == result.p99 == 0.0
        assert result.top1 == 1.0


def test_the_divergence_is_that_of_one_text_at_a_time(
    random_parent: Path, random_checkpoint: Path, samples: list[Sample]
) -> None:
    parent, model, tokenizer = load_model(random_parent), load_model(random_checkpoint), load_tokenizer(random_parent)
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
    found = divergence(parent, model, tokenizer, samples)
    assert found.keys() == values.keys()
    for stratum, parts in values.items():
        every = torch.cat(parts)
        assert found[stratum].tokens == len(every)
        assert found[stratum].mean == pytest.approx(every.mean().item(), rel=1e-4)
        assert found[stratum].median == pytest.approx(every.quantile(0.5).item(), rel=1e-4)
        assert found[stratum].low <= found[stratum].mean <= found[stratum].high
        assert found[stratum].mean > 0.01
