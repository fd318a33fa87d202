"""The layer-by-layer pass against transformers' whole model, forwards and backwards."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from vqserve.encode.fisher import fisher_gradient
from vqserve.encode.parent import Parent
from vqserve.model.forward import Head, Layer, embed
from vqserve.model.tokens import Batch, Tokens

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def parent(random_parent: Path) -> Parent:
    return Parent(random_parent)


@pytest.fixture(scope="module")
def whole(random_parent: Path) -> nn.Module:
    model: nn.Module = AutoModelForCausalLM.from_pretrained(random_parent, dtype=torch.float32).eval()
    return model.requires_grad_(False)


@pytest.fixture
def tokens(seed: int) -> Tokens:
    generator = torch.Generator().manual_seed(seed)
    lengths = (3, 41, 17, 40)
    ids = torch.randint(0, 640, (sum(lengths),), generator=generator)
    return Tokens(ids, torch.rand(len(ids), generator=generator) < 0.7, lengths)


def layer_outputs(parent: Parent, tokens: Tokens) -> list[Tensor]:
    """Inputs of the first layer, and the outputs of all."""
    hidden = [embed(parent, tokens, torch.float32)]
    for index in range(parent.geometry.num_hidden_layers):
        hidden.append(Layer(parent, index, CPU).run(tokens, hidden[-1], {}))
    return hidden


def test_layer_by_layer_equals_the_whole_model(parent: Parent, whole: nn.Module, tokens: Tokens) -> None:
    found = layer_outputs(parent, tokens)[-1]
    for part, ids in zip(found.split(tokens.lengths), tokens.ids.split(tokens.lengths), strict=True):
        wanted = whole(ids[None]).logits[0]
        norm, head = whole.get_submodule("model.norm"), whole.get_submodule("lm_head")
        torch.testing.assert_close(head(norm(part)), wanted, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(Head(parent, CPU, torch.float32)(part), wanted, rtol=1e-4, atol=1e-4)


def test_watchers_see_every_token_once_and_the_routers_choice(parent: Parent, tokens: Tokens) -> None:
    hidden = layer_outputs(parent, tokens)
    seen = torch.zeros(len(tokens.ids), dtype=torch.int64)
    sums = []

    def see(batch: Batch, inputs: Tensor, output: tuple[Tensor, Tensor, Tensor]) -> None:
        index, valid = batch.index, batch.valid
        seen.index_add_(0, index[valid], torch.ones_like(index[valid]))
        sums.append(output[1].view(*valid.shape, -1)[valid].sum(1))

    Layer(parent, 2, CPU).run(tokens, hidden[2], {"mlp.gate": see})
    assert (seen == 1).all()
    # Router weights are normalized, then multiplied by routed_scaling_factor.
    torch.testing.assert_close(torch.cat(sums), torch.full((len(tokens.ids),), 2.5))


def test_backward_through_the_layers_equals_autograd_through_the_whole_model(
    parent: Parent, whole: nn.Module, tokens: Tokens
) -> None:
    hidden = layer_outputs(parent, tokens)
    gradient = fisher_gradient(parent, tokens, hidden[-1], CPU, seed=5)
    assert not gradient[~tokens.predicts].any()
    found = {4: gradient}
    for index in (3, 2):
        found[index] = Layer(parent, index, CPU).backward(tokens, hidden[index], found[index + 1])
    # The labels that fisher_gradient draws: one per counted prediction, in order, from the model's own chances.
    norm, head = whole.get_submodule("model.norm"), whole.get_submodule("lm_head")
    chances = head(norm(hidden[-1][tokens.predicts])).softmax(-1)
    labels = torch.full((len(tokens.ids),), -100)
    labels[tokens.predicts] = torch.multinomial(chances, 1, generator=torch.Generator().manual_seed(5))[:, 0]
    inputs = [layer.requires_grad_() for layer in hidden[2].split(tokens.lengths)]
    for part, target, at in zip(inputs, labels.split(tokens.lengths), found[2].split(tokens.lengths), strict=True):
        # Layer 2 of the whole model gets these inputs, whatever the layers before made of the ids.
        hook = whole.get_submodule("model.layers.2").register_forward_pre_hook(
            lambda module, args, kwargs, part=part: ((part[None],), {**kwargs}), with_kwargs=True
        )
        logits = whole(torch.zeros(1, len(part), dtype=torch.int64)).logits[0]
        hook.remove()
        loss = nn.functional.cross_entropy(logits, target, ignore_index=-100, reduction="sum")
        (wanted,) = torch.autograd.grad(loss, part) if (target != -100).any() else (torch.zeros_like(part),)
        torch.testing.assert_close(at, wanted, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_squared_fisher_gradient_predicts_the_divergence_of_a_small_change(
    temperature: float, parent: Parent, whole: nn.Module, tokens: Tokens
) -> None:
    hidden = layer_outputs(parent, tokens)[-1]
    norm, head = whole.get_submodule("model.norm"), whole.get_submodule("lm_head")
    step = 0.01 * torch.randn(hidden.shape[1], generator=torch.Generator().manual_seed(3)).expand_as(hidden)
    before, after = (
        (head(norm(h)).double() / temperature).log_softmax(-1)[tokens.predicts] for h in (hidden, hidden + step)
    )
    divergence = (before.exp() * (before - after)).sum()
    squares = [
        (fisher_gradient(parent, tokens, hidden, CPU, seed, temperature) * step).double().sum(1).square().sum() / 2
        for seed in range(200)
    ]
    mean, spread = torch.stack(squares).mean(), torch.stack(squares).std() / 200**0.5
    assert abs(mean - divergence) < 5 * spread + 0.03 * divergence
