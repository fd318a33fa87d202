"""Runs the parent on the calibration text, one layer at a time.

The layer is transformers' own decoder layer. Its sparse indexer is left out: sequences are no longer than `index_topk`,
and up to that length it selects everything.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import one_hot
from transformers.models.glm_moe_dsa import GlmMoeDsaConfig
from transformers.models.glm_moe_dsa.modeling_glm_moe_dsa import (
    GlmMoeDsaDecoderLayer,
    GlmMoeDsaRMSNorm,
    GlmMoeDsaRotaryEmbedding,
)

from vqserve.encode.calibration import Batch, Tokens
from vqserve.encode.parent import Parent

Watcher = Callable[[Batch, Tensor, Any], None]
"""Sees a module at work: the batch, the module's input `[B, S, C]`, and its output as the module returns it."""

_HEAD_TOKENS = 1024


def compute_dtype(device: torch.device) -> torch.dtype:
    """What the forward pass computes in: bf16 on a GPU, where a real layer would not fit otherwise, else fp32."""
    return torch.float32 if device.type == "cpu" else torch.bfloat16


class Layer:
    """One decoder layer of the parent on a device."""

    def __init__(self, parent: Parent, index: int, device: torch.device) -> None:
        self._device, self._dtype = device, compute_dtype(device)
        config = _config(parent)
        with torch.device("meta"):
            self._module = GlmMoeDsaDecoderLayer(config, index).eval()
        self._module.load_state_dict(_state(parent, index, device, self._dtype), assign=True)
        self._module.requires_grad_(False)
        self._rotary = GlmMoeDsaRotaryEmbedding(config).to(device)

    def run(self, tokens: Tokens, hidden: Tensor, watchers: Mapping[str, Watcher]) -> Tensor:
        """Runs over all tokens.

        Args:
            tokens: Where sequences begin and end.
            hidden: The layer's inputs, `[T, C]` on the CPU.
            watchers: By name of a module within the layer.

        Returns:
            The layer's outputs, like `hidden`.
        """
        result, batch = torch.empty_like(hidden), next(tokens.batches())

        def hook(see: Watcher) -> Callable[[Any, tuple[Any, ...], Any], None]:
            return lambda module, args, output: see(batch, args[0], output)

        hooks = [self._module.get_submodule(name).register_forward_hook(hook(see)) for name, see in watchers.items()]
        with torch.no_grad():
            for batch in tokens.batches():
                output = self._forward(hidden[batch.index].to(self._device, self._dtype))
                result[batch.index[batch.valid]] = output[batch.valid.to(self._device)].to(hidden)
        for handle in hooks:
            handle.remove()
        return result

    def backward(self, tokens: Tokens, hidden: Tensor, gradient: Tensor) -> Tensor:
        """The gradient with respect to the inputs `hidden`, given that with respect to the outputs; all `[T, C]`."""
        result = torch.empty_like(gradient)
        for batch in tokens.batches():
            inputs = hidden[batch.index].to(self._device, self._dtype).requires_grad_()
            outer = (gradient[batch.index] * batch.valid[..., None]).to(self._device, self._dtype)
            (inner,) = torch.autograd.grad(self._forward(inputs), inputs, outer)
            result[batch.index[batch.valid]] = inner[batch.valid.to(self._device)].to(gradient)
        return result

    def _forward(self, hidden: Tensor) -> Tensor:
        batch, length, _ = hidden.shape
        places = torch.arange(length, device=self._device)
        output, _ = self._module(
            hidden_states=hidden,
            attention_mask=(places[:, None] >= places)[None, None],
            position_ids=places[None],
            position_embeddings=self._rotary(hidden, places[None]),
            prev_topk_indices=places.to(torch.int32).expand(batch, length, length),
        )
        assert isinstance(output, Tensor)
        return output


def embed(parent: Parent, tokens: Tokens, dtype: torch.dtype) -> Tensor:
    """Inputs of the first layer, `[T, C]`."""
    return parent.tensor("model.embed_tokens.weight")[tokens.ids].to(dtype)


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
    norm = GlmMoeDsaRMSNorm(parent.geometry.hidden_size, _config(parent).rms_norm_eps).to(device)
    norm.load_state_dict({"weight": parent.tensor("model.norm.weight").to(device, dtype)}, assign=True)
    norm.requires_grad_(False)
    head = parent.tensor("lm_head.weight").to(device, dtype) / temperature
    generator = torch.Generator().manual_seed(seed)
    result = torch.zeros_like(hidden)
    for part in tokens.predicts.nonzero()[:, 0].split(_HEAD_TOKENS):
        inputs = hidden[part].to(device, dtype).requires_grad_()
        normed = norm(inputs)
        chances = (normed.detach() @ head.t()).float().softmax(-1)
        drawn = torch.multinomial(chances.cpu(), 1, generator=generator)[:, 0].to(device)
        outer = (chances - one_hot(drawn, len(head))).to(dtype) @ head
        (inner,) = torch.autograd.grad(normed, inputs, outer)
        result[part] = inner.to(hidden)
    return result


def _config(parent: Parent) -> GlmMoeDsaConfig:
    config = GlmMoeDsaConfig(**parent.config)
    config.indexer_types = ["shared"] * config.num_hidden_layers
    config._attn_implementation, config._experts_implementation = "sdpa", "eager"
    return config


def _state(parent: Parent, index: int, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
    """The layer's tensors under transformers' names, experts stacked."""
    state = {
        name: tensor.to(device, torch.float32 if name.endswith("e_score_correction_bias") else dtype)
        for name, tensor in parent.layer(index).items()
    }
    if index in parent.geometry.moe_layers:
        experts = [parent.expert(index, expert) for expert in range(parent.geometry.n_routed_experts)]
        pairs = [torch.cat([expert["gate_proj"], expert["up_proj"]]) for expert in experts]
        state["mlp.experts.gate_up_proj"] = torch.stack(pairs).to(device, dtype)
        state["mlp.experts.down_proj"] = torch.stack([expert["down_proj"] for expert in experts]).to(device, dtype)
    return state
