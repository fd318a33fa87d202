"""A complete GLM-MoE-DSA parent of random weights: what every test can have without training.

Weights keep the variance of what flows through them, so that logits are far from flat and a wrong rotation, head or
expert shows.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor

from vqserve.format.geometry import Geometry
from vqserve.format.layout import TensorSpec, parent_specs

CONFIG: dict[str, Any] = {
    "architectures": ["GlmMoeDsaForCausalLM"],
    "model_type": "glm_moe_dsa",
    "dtype": "bfloat16",
    "vocab_size": 640,
    "hidden_size": 256,
    "intermediate_size": 512,
    "moe_intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "n_routed_experts": 16,
    "num_experts_per_tok": 4,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 512,
    "q_lora_rank": 128,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 192,
    "qk_head_dim": 256,
    "head_dim": 64,
    "v_head_dim": 256,
    "max_position_embeddings": 4096,
    "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
    "rms_norm_eps": 1e-5,
    "routed_scaling_factor": 2.5,
    "norm_topk_prob": True,
    "n_group": 1,
    "topk_group": 1,
    "topk_method": "noaux_tc",
    "scoring_func": "sigmoid",
    "hidden_act": "silu",
    "attention_bias": False,
    "index_topk": 2048,
    "index_head_dim": 128,
    "index_n_heads": 4,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": 0,
    "pad_token_id": 0,
}

CONTROL = (
    *("<|endoftext|>", "[MASK]", "[gMASK]", "[sMASK]", "<sop>", "<eop>"),
    *("<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"),
)
MARKUP = (
    *("<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>"),
    *("<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>"),
)
CHAT_TEMPLATE = """\
[gMASK]<sop>
{%- for message in messages -%}<|{{ message.role }}|>{{ message.content }}{%- endfor -%}
{%- if add_generation_prompt -%}<|assistant|>
{%- if enable_thinking is defined and not enable_thinking -%}</think>{%- else -%}<think>{%- endif -%}
{%- endif -%}
"""


def make_random_parent(folder: Path, *, seed: int = 0, files: int = 2, **overrides: Any) -> Path:
    """Writes a bf16 parent checkpoint with tokenizer and chat template.

    Args:
        folder: Made if it does not exist.
        seed: Same seed, same bytes.
        files: Into how many safetensors files the weights go.
        **overrides: Values of `config.json` that differ from the small model's.
    """
    config = {**CONFIG, **overrides}
    config["qk_head_dim"] = config["qk_nope_head_dim"] + config["qk_rope_head_dim"]
    config["num_key_value_heads"] = config["num_attention_heads"]
    config["head_dim"] = config["qk_rope_head_dim"]
    layers, dense = config["num_hidden_layers"], config["first_k_dense_replace"]
    config.setdefault("mlp_layer_types", ["dense"] * dense + ["sparse"] * (layers - dense))
    config.setdefault("indexer_types", ["full"] * layers)
    generator = torch.Generator().manual_seed(seed)
    specs = parent_specs(Geometry.from_dict(config))
    folder.mkdir(parents=True, exist_ok=True)
    write_weights(folder, {name: _random(spec, generator) for name, spec in specs.items()}, files)
    write_json(folder / "config.json", config)
    write_json(folder / "generation_config.json", {"eos_token_id": [0], "pad_token_id": 0})
    _write_tokenizer(folder, config["max_position_embeddings"])
    return folder


def write_weights(folder: Path, tensors: Mapping[str, Tensor], files: int) -> None:
    """Spreads `tensors` over safetensors files of about equal bytes and writes their index."""
    total, filled = sum(tensor.nbytes for tensor in tensors.values()), 0
    parts: list[dict[str, Tensor]] = [{} for _ in range(files)]
    for name, tensor in tensors.items():
        parts[min(filled * files // total, files - 1)][name] = tensor
        filled += tensor.nbytes
    names = [f"model-{at + 1:05d}-of-{files:05d}.safetensors" for at in range(files)]
    for name, part in zip(names, parts, strict=True):
        save_file(part, folder / name, {"format": "pt"})
    weight_map = {tensor: name for name, part in zip(names, parts, strict=True) for tensor in part}
    write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map})


def write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def _random(spec: TensorSpec, generator: torch.Generator) -> Tensor:
    noise = torch.randn(spec.shape, generator=generator)
    if spec.name.endswith("e_score_correction_bias"):
        return 0.05 * noise
    if spec.name.endswith("k_norm.bias"):
        return (0.1 * noise).bfloat16()
    if len(spec.shape) == 1:
        return (1 + 0.1 * noise).bfloat16()
    if spec.name.endswith("embed_tokens.weight"):
        return noise.bfloat16()
    if spec.name.endswith(("lm_head.weight", "shared_head.head.weight")):
        noise = 3 * noise
    return (noise / math.sqrt(spec.shape[1])).bfloat16()


def _write_tokenizer(folder: Path, length: int) -> None:
    pieces = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: at for at, token in enumerate((*CONTROL, *MARKUP, *pieces))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in CONTROL])
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in MARKUP])
    tokenizer.save(str(folder / "tokenizer.json"))
    write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": CONTROL[0],
            "pad_token": CONTROL[0],
            "clean_up_tokenization_spaces": False,
            "model_max_length": length,
        },
    )
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
