"""How the log-likelihood changes with the last layer's outputs: where the sensitivity of experts comes from."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from vqserve.encode.parent import Parent
from vqserve.model.forward import Head, compute_dtype
from vqserve.model.tokens import Tokens

_HEAD_TOKENS = 1024


def fisher_gradient(
    parent: Parent, tokens: Tokens, hidden: Tensor, device: torch.device, seed: int, temperature: float = 1.0
) -> Tensor:
    """The gradient of the model's own log-likelihood with respect to the last layer's outputs.

    Labels are drawn from the model's predictions, so that the expected square of this gradient is the Fisher
    information: half of (change of outputs)' Fisher (change of outputs) is the KL divergence, to second order.

    Args:
        parent: For the final norm and the head.
        tokens: Only predictions that count contribute.
        hidden: Outputs of the last layer, `[T, C]` on the CPU.
        device: To compute on.
        seed: Of the drawn labels.
        temperature: That predictions are made at: logits are divided by it.

    Returns:
        Like `hidden`; 0 where the prediction does not count.
    """
    dtype = compute_dtype(device)
    head = Head(parent, device, dtype)
    norm, weight = head.norm, head.weight / temperature
    generator = torch.Generator().manual_seed(seed)
    result = torch.zeros_like(hidden)
    for part in tokens.predicts.nonzero()[:, 0].split(_HEAD_TOKENS):
        inputs = hidden[part].to(device, dtype).requires_grad_()
        normed = norm(inputs)
        chances = (normed.detach() @ weight.t()).float().softmax(-1)
        drawn = torch.multinomial(chances.cpu(), 1, generator=generator)[:, 0].to(device)
        outer = (chances - one_hot(drawn, len(weight))).to(dtype) @ weight
        (inner,) = torch.autograd.grad(normed, inputs, outer)
        result[part] = inner.to(hidden)
    return result
