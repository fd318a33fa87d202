"""The demo model's network for training: GLM-MoE-DSA with dense attention and every expert computed on every token.

Both are exact: up to `index_topk` tokens the sparse indexer selects everything, and an expert a token is not routed to
gets weight 0. tests/demo compares the logits with transformers' own class.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

EPS, ROPE_THETA, INIT_STD = 1e-5, 10_000.0, 0.02
INDEX_HEADS, INDEX_HEAD_DIM = 2, 128


@dataclass(frozen=True)
class Shape:
    """Geometry of the network; head dimensions are GLM-5.2's own, which CUDA's MLA prefill asks for."""

    vocab_size: int = 640
    hidden: int = 256
    layers: int = 4
    heads: int = 2
    nope_dim: int = 192
    rope_dim: int = 64
    value_dim: int = 256
    q_rank: int = 128
    kv_rank: int = 512
    dense_width: int = 512
    expert_width: int = 256
    experts: int = 16
    top_k: int = 4
    routed_scale: float = 2.5
    context: int = 4096


class Norm(nn.Module):
    """RMS norm."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],), self.weight.to(x.dtype), EPS)


def linear(n_in: int, n_out: int) -> nn.Linear:
    """A projection without bias, initialized as GLM does."""
    layer = nn.Linear(n_in, n_out, bias=False)
    nn.init.normal_(layer.weight, std=INIT_STD)
    return layer


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding over interleaved pairs; the output holds first the even, then the odd halves."""
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.cat([even * cos - odd * sin, odd * cos + even * sin], -1)


class Attention(nn.Module):
    """Multi-head latent attention."""

    def __init__(self, s: Shape) -> None:
        super().__init__()
        self.shape = s
        self.q_a_proj, self.q_a_layernorm = linear(s.hidden, s.q_rank), Norm(s.q_rank)
        self.q_b_proj = linear(s.q_rank, s.heads * (s.nope_dim + s.rope_dim))
        self.kv_a_proj_with_mqa, self.kv_a_layernorm = linear(s.hidden, s.kv_rank + s.rope_dim), Norm(s.kv_rank)
        self.kv_b_proj = linear(s.kv_rank, s.heads * (s.nope_dim + s.value_dim))
        self.o_proj = linear(s.heads * s.value_dim, s.hidden)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        s, (batch, length, _) = self.shape, x.shape
        split = (batch, length, s.heads, -1)
        q = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x))).view(split).transpose(1, 2)
        q_nope, q_rope = q.split([s.nope_dim, s.rope_dim], -1)
        latent, k_rope = self.kv_a_proj_with_mqa(x).split([s.kv_rank, s.rope_dim], -1)
        kv = self.kv_b_proj(self.kv_a_layernorm(latent)).view(split).transpose(1, 2)
        k_nope, value = kv.split([s.nope_dim, s.value_dim], -1)
        query = torch.cat([q_nope, rotate(q_rope, cos, sin)], -1)
        key = torch.cat([k_nope, rotate(k_rope[:, None], cos, sin).expand(-1, s.heads, -1, -1)], -1)
        scale = (s.nope_dim + s.rope_dim) ** -0.5
        out = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale)
        result: Tensor = self.o_proj(out.transpose(1, 2).reshape(batch, length, -1))
        return result


class MLP(nn.Module):
    """SwiGLU."""

    def __init__(self, hidden: int, width: int) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = (
            linear(hidden, width),
            linear(hidden, width),
            linear(width, hidden),
        )

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return result


class Router(nn.Module):
    """Sigmoid scores; the correction bias steers the choice of experts, never their weights."""

    e_score_correction_bias: Tensor

    def __init__(self, s: Shape) -> None:
        super().__init__()
        self.shape = s
        self.weight = nn.Parameter(torch.randn(s.experts, s.hidden) * INIT_STD)
        self.register_buffer("e_score_correction_bias", torch.zeros(s.experts))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """-> weights and 0/1 choices, both fp32 `[..., experts]`."""
        scores = F.linear(x.float(), self.weight.float()).sigmoid()
        chosen = (scores + self.e_score_correction_bias).topk(self.shape.top_k, -1).indices
        mask = torch.zeros_like(scores).scatter_(-1, chosen, 1.0)
        weights = scores * mask
        return weights / weights.sum(-1, keepdim=True) * self.shape.routed_scale, mask


class MoE(nn.Module):
    """Routed experts plus one shared expert; expert weights are stacked `[experts, out, in]`."""

    def __init__(self, s: Shape) -> None:
        super().__init__()
        self.shape = s
        self.gate, self.shared_experts = Router(s), MLP(s.hidden, s.expert_width)
        self.gate_proj = nn.Parameter(torch.randn(s.experts, s.expert_width, s.hidden) * INIT_STD)
        self.up_proj = nn.Parameter(torch.randn(s.experts, s.expert_width, s.hidden) * INIT_STD)
        self.down_proj = nn.Parameter(torch.randn(s.experts, s.hidden, s.expert_width) * INIT_STD)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """-> output, and the share of tokens that chose each expert `[experts]`."""
        s, flat = self.shape, x.reshape(-1, x.shape[-1])
        weights, mask = self.gate(flat)
        gate, up = (flat @ w.to(flat.dtype).flatten(0, 1).t() for w in (self.gate_proj, self.up_proj))
        hidden = (F.silu(gate) * up).view(-1, s.experts, s.expert_width) * weights.to(flat.dtype)[..., None]
        down = self.down_proj.to(flat.dtype).transpose(1, 2).reshape(-1, s.hidden)
        return (hidden.flatten(1) @ down).view_as(x) + self.shared_experts(x), mask.mean(0)


class Layer(nn.Module):
    """One decoder layer; the first is dense."""

    def __init__(self, s: Shape, index: int) -> None:
        super().__init__()
        self.self_attn = Attention(s)
        self.mlp: MLP | MoE = MoE(s) if index else MLP(s.hidden, s.dense_width)
        self.input_layernorm, self.post_attention_layernorm = Norm(s.hidden), Norm(s.hidden)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor | None]:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        out = self.mlp(self.post_attention_layernorm(x))
        return (x + out[0], out[1]) if isinstance(out, tuple) else (x + out, None)


class Model(nn.Module):
    """The whole network."""

    cos: Tensor
    sin: Tensor

    def __init__(self, s: Shape | None = None) -> None:
        super().__init__()
        self.shape = s = s or Shape()
        self.embed_tokens = nn.Embedding(s.vocab_size, s.hidden)
        nn.init.normal_(self.embed_tokens.weight, std=INIT_STD)
        self.layers = nn.ModuleList(Layer(s, i) for i in range(s.layers))
        self.norm, self.lm_head = Norm(s.hidden), linear(s.hidden, s.vocab_size)
        angles = torch.arange(s.context)[:, None] * ROPE_THETA ** (-torch.arange(0, s.rope_dim, 2) / s.rope_dim)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    @property
    def moes(self) -> list[MoE]:
        """The MoE blocks, first to last."""
        return [layer.mlp for layer in self.layers if isinstance(layer.mlp, MoE)]

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """-> logits `[batch, length, vocab]` and expert loads `[MoE layers, experts]`."""
        x, loads = self.embed_tokens(ids), []
        dtype = torch.get_autocast_dtype(ids.device.type) if torch.is_autocast_enabled(ids.device.type) else x.dtype
        cos, sin = (table[: ids.shape[1]].to(dtype) for table in (self.cos, self.sin))
        for layer in self.layers:
            x, load = layer(x, cos, sin)
            if load is not None:
                loads.append(load)
        return self.lm_head(self.norm(x)), torch.stack(loads)


def hub_tensors(model: Model) -> dict[str, Tensor]:
    """The weights under the hub's names: bf16, one tensor per expert and projection, plus an untrained indexer."""
    tensors: dict[str, Tensor] = {}
    for key, value in model.state_dict().items():
        name, value = key if key.startswith("lm_head") else f"model.{key}", value.detach().float().cpu()
        stem, projection = name.rsplit(".", 1)
        if projection in ("gate_proj", "up_proj", "down_proj"):
            for e, weight in enumerate(value):
                tensors[f"{stem}.experts.{e}.{projection}.weight"] = weight.bfloat16().clone()
        else:
            tensors[name] = value if "correction_bias" in name else value.bfloat16()
    generator = torch.Generator().manual_seed(0)
    s = model.shape
    for i in range(s.layers):
        stem = f"model.layers.{i}.self_attn.indexer"
        for leaf, rows, columns in (
            ("wq_b", INDEX_HEADS * INDEX_HEAD_DIM, s.q_rank),
            ("wk", INDEX_HEAD_DIM, s.hidden),
            ("weights_proj", INDEX_HEADS, s.hidden),
        ):
            weight = torch.randn(rows, columns, generator=generator) * INIT_STD
            tensors[f"{stem}.{leaf}.weight"] = weight.bfloat16()
        tensors[f"{stem}.k_norm.weight"] = torch.ones(INDEX_HEAD_DIM).bfloat16()
        tensors[f"{stem}.k_norm.bias"] = torch.zeros(INDEX_HEAD_DIM).bfloat16()
    return tensors


def hub_config(s: Shape, stop_ids: list[int]) -> dict[str, object]:
    """config.json of the exported model."""
    return {
        "architectures": ["GlmMoeDsaForCausalLM"],
        "model_type": "glm_moe_dsa",
        "dtype": "bfloat16",
        "vocab_size": s.vocab_size,
        "hidden_size": s.hidden,
        "intermediate_size": s.dense_width,
        "moe_intermediate_size": s.expert_width,
        "num_hidden_layers": s.layers,
        "num_attention_heads": s.heads,
        "num_key_value_heads": s.heads,
        "n_routed_experts": s.experts,
        "num_experts_per_tok": s.top_k,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
        "mlp_layer_types": ["dense"] + ["sparse"] * (s.layers - 1),
        "q_lora_rank": s.q_rank,
        "kv_lora_rank": s.kv_rank,
        "qk_nope_head_dim": s.nope_dim,
        "qk_rope_head_dim": s.rope_dim,
        "qk_head_dim": s.nope_dim + s.rope_dim,
        "head_dim": s.rope_dim,
        "v_head_dim": s.value_dim,
        "max_position_embeddings": s.context,
        "rope_parameters": {"rope_theta": ROPE_THETA, "rope_type": "default"},
        "rms_norm_eps": EPS,
        "routed_scaling_factor": s.routed_scale,
        "norm_topk_prob": True,
        "n_group": 1,
        "topk_group": 1,
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
        "hidden_act": "silu",
        "attention_bias": False,
        "index_topk": 2048,
        "index_head_dim": INDEX_HEAD_DIM,
        "index_n_heads": INDEX_HEADS,
        "indexer_types": ["full"] * s.layers,
        "num_nextn_predict_layers": 0,
        "tie_word_embeddings": False,
        "eos_token_id": stop_ids,
        "pad_token_id": stop_ids[0],
    }


def export(model: Model, folder: Path, stop_ids: list[int]) -> None:
    """Write config.json and two safetensors files with their index, each under a temporary name first."""
    tensors = hub_tensors(model)
    total, size = sum(t.nbytes for t in tensors.values()), 0
    parts: list[dict[str, Tensor]] = [{}, {}]
    for name in sorted(tensors):
        parts[2 * size >= total][name] = tensors[name]
        size += tensors[name].nbytes
    weight_map: dict[str, str] = {}
    for i, part in enumerate(parts, 1):
        file = f"model-{i:05d}-of-{len(parts):05d}.safetensors"
        save_file(part, folder / f"{file}.part", {"format": "pt"})
        (folder / f"{file}.part").chmod(0o644)  # safetensors would leave it unreadable for others
        (folder / f"{file}.part").replace(folder / file)
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    for file, content in (
        ("model.safetensors.index.json", index),
        ("config.json", hub_config(model.shape, stop_ids)),
    ):
        (folder / f"{file}.part").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        (folder / f"{file}.part").replace(folder / file)
