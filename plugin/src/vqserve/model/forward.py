"""Runs a model one layer at a time, so that no more than a layer's weights are held.

The layer is transformers' own decoder layer. Its sparse indexer is left out: sequences are no longer than `index_topk`,
and up to that length it selects everything.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers.models.glm_moe_dsa import GlmMoeDsaConfig
from transformers.models.glm_moe_dsa.modeling_glm_moe_dsa import (
    GlmMoeDsaDecoderLayer,
    GlmMoeDsaRMSNorm,
    GlmMoeDsaRotaryEmbedding,
)

from vqserve.model.tokens import Batch, Tokens
from vqserve.model.weights import Model

Watcher = Callable[[Batch, Tensor, Any], None]
"""Sees a module at work: the batch, the module's input `[B, S, C]`, and its output as the module returns it."""


def compute_dtype(device: torch.device) -> torch.dtype:
    """What the forward pass computes in: bf16 on a GPU, where a real layer would not fit otherwise, else fp32."""
    return torch.float32 if device.type == "cpu" else torch.bfloat16


class Layer:
    """One decoder layer of a model on a device.

    Args:
        model: Whose.
        index: Which.
        device: Where.
        dtype: Of weights and activations; `compute_dtype` of the device if None.
    """

    def __init__(self, model: Model, index: int, device: torch.device, dtype: torch.dtype | None = None) -> None:
        self._device, self._dtype = device, dtype or compute_dtype(device)
        config = _config(model)
        with torch.device("meta"):
            self._module = GlmMoeDsaDecoderLayer(config, index).eval()
        self._module.load_state_dict(_state(model, index, device, self._dtype), assign=True)
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


def embed(model: Model, tokens: Tokens, dtype: torch.dtype) -> Tensor:
    """Inputs of the first layer, `[T, C]`."""
    return model.tensor("model.embed_tokens.weight")[tokens.ids].to(dtype)


class Head:
    """The final norm and the head of a model on a device: from the last layer's outputs to logits."""

    def __init__(self, model: Model, device: torch.device, dtype: torch.dtype) -> None:
        self.norm = GlmMoeDsaRMSNorm(model.geometry.hidden_size, _config(model).rms_norm_eps).to(device)
        self.norm.load_state_dict({"weight": model.tensor("model.norm.weight").to(device, dtype)}, assign=True)
        self.norm.requires_grad_(False)
        self.weight = model.tensor("lm_head.weight").to(device, dtype)

    def __call__(self, hidden: Tensor) -> Tensor:
        """`[T, C]` -> `[T, V]`, in the dtype of the head."""
        logits: Tensor = self.norm(hidden.to(self.weight)) @ self.weight.t()
        return logits


def _config(model: Model) -> GlmMoeDsaConfig:
    config = GlmMoeDsaConfig(**model.config)
    config.indexer_types = ["shared"] * config.num_hidden_layers
    config._attn_implementation, config._experts_implementation = "sdpa", "eager"
    return config


def _state(model: Model, index: int, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
    """The layer's tensors under transformers' names, experts stacked."""
    state = {
        name: tensor.to(device, torch.float32 if name.endswith("e_score_correction_bias") else dtype)
        for name, tensor in model.layer(index).items()
    }
    if index in model.geometry.moe_layers:
        experts = [model.expert(index, expert) for expert in range(model.geometry.n_routed_experts)]
        pairs = [torch.cat([expert["gate_proj"], expert["up_proj"]]) for expert in experts]
        state["mlp.experts.gate_up_proj"] = torch.stack(pairs).to(device, dtype)
        state["mlp.experts.down_proj"] = torch.stack([expert["down_proj"] for expert in experts]).to(device, dtype)
    return state
