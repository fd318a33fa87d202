"""What `config.json` may say beside sizes, so that both of its readers compute the same model.

The encoder runs transformers' class `GlmMoeDsa*`, the server vLLM's, and each reads keys that the other does not, with
defaults of its own: without `scoring_func`, transformers takes sigmoid and vLLM softmax, and neither says a word. Every
key that either reads and that is no size is listed here: with the one meaning that both give it, or as harmless. A test
reads the sources of both and fails for a key that is not.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from vqserve.format.errors import ConfigError

ARCHITECTURE = "GlmMoeDsaForCausalLM"

IMPLIED: Mapping[str, object] = {"scoring_func": "sigmoid", "topk_method": "noaux_tc", "indexer_rope_interleave": True}
"""What transformers' class always computes, whatever the configuration says, and vLLM only if told."""

NO_EFFECT = frozenset(
    {
        # Read by training, by generation or by the tokenizer's side, or overwritten by transformers' class.
        *("attention_dropout", "head_dim", "initializer_range", "output_router_logits", "pad_token_id", "use_cache"),
        *("bos_token_id", "eos_token_id", "transformers_version", "_name_or_path", "name_or_path"),
    }
)

_UNSUPPORTED = "this variant is not supported"
_ABSENT = (
    # Read by vLLM alone; each changes attention, a size, how weights are stored, or the part of it all that counts.
    *("attn_config", "attn_module_list_cfg", "attn_type_list", "block_configs", "dual_chunk_attention_config"),
    *("encoder", "encoder_config", "is_heterogeneous", "llama_4_scaling", "per_layer_config", "rswa_window"),
    *("sliding_window", "text_config", "transf_decoder", "use_bidirectional_attention", "vision_config"),
    *("position_embedding_type", "model_max_length", "num_layers", "hidden_size_per_head", "attention_head_dim"),
    *("language_config", "compression_config", "compress_ratios", "model", "is_mm_prefix_lm"),
    *("n_head_kv", "num_kv_heads", "multi_query_group_num", "num_attention_groups", "moe_num_experts"),
    *("num_experts_per_token", "top_k_experts", "moe_topk", "moe_top_k", "n_positions", "max_seq_len", "seq_length"),
    *("max_target_positions", "max_sequence_length", "max_seq_length", "seq_len"),
)


@dataclass(frozen=True)
class Rule:
    """What one key may say.

    Attributes:
        expected: For the error.
        holds: Whether a value is that, given the whole configuration.
        required: Whether it must be there, vLLM's default being another than what transformers computes.
    """

    expected: str
    holds: Callable[[Any, Mapping[str, Any]], bool]
    required: bool = False


def _only(value: object, required: bool = False) -> Rule:
    return Rule(json.dumps(value), lambda found, _: type(found) is type(value) and found == value, required)


INDEXED_ATTENTION = ("indexed_attention", "deepseek_sparse_attention")
"""Attention to the tokens that an indexer picks; the second is transformers' older name of it."""


def _same_as(key: str) -> Rule:
    return Rule(f"the same as {key}", lambda found, config: type(found) is int and found == config.get(key))


RULES: Mapping[str, Rule] = {
    **{key: _only(value, required=key != "indexer_rope_interleave") for key, value in IMPLIED.items()},
    "attention_bias": _only(False),
    "mlp_bias": _only(False),
    "hidden_act": _only("silu"),
    "is_causal": _only(True),
    "moe_layer_freq": _only(1),
    "moe_router_dtype": _only("float32"),
    "n_group": _only(1),
    "topk_group": _only(1),
    "norm_topk_prob": _only(True),
    "rope_interleave": _only(True),
    "num_experts": _same_as("n_routed_experts"),
    "num_local_experts": _same_as("n_routed_experts"),
    "num_key_value_heads": _same_as("num_attention_heads"),
    "architectures": _only([ARCHITECTURE]),
    "layer_types": Rule(
        "'indexed_attention' for every layer",
        lambda found, config: any(found == [name] * config["num_hidden_layers"] for name in INDEXED_ATTENTION),
    ),
    "qk_head_dim": Rule(
        "the sum of qk_nope_head_dim and qk_rope_head_dim",
        lambda found, config: found == config["qk_nope_head_dim"] + config["qk_rope_head_dim"],
    ),
    "rms_norm_eps": Rule("a number above 0 and up to 0.001", lambda found, _: _is_number(found) and 0 < found <= 1e-3),
    "routed_scaling_factor": Rule("a number above 0", lambda found, _: _is_number(found) and found > 0),
    "rope_parameters": Rule(
        "rope_type 'default' and a rope_theta above 0, nothing else",
        lambda found, _: (
            isinstance(found, Mapping)
            and set(found) == {"rope_type", "rope_theta"}
            and found["rope_type"] == "default"
            and _is_number(found["rope_theta"])
            and found["rope_theta"] > 0
        ),
    ),
    "rope_theta": Rule(
        "a number above 0, that of rope_parameters if these are there",
        lambda found, config: (
            _is_number(found)
            and found > 0
            and (config.get("rope_parameters") is None or found == config["rope_parameters"].get("rope_theta"))
        ),
    ),
    **dict.fromkeys((*_ABSENT, "rope_scaling"), Rule("no such key", lambda found, _: False)),
}
"""By key. A value of null counts as absent, as it does for both readers."""

_DEFAULTS = {"num_key_value_heads": 64}
"""What both readers take for an absent key, where that is not fine for every model."""


def completed(config: Mapping[str, Any]) -> dict[str, Any]:
    """A parent's configuration with what transformers' class implies written out, for vLLM to read."""
    return {**config, **{key: value for key, value in IMPLIED.items() if config.get(key) is None}}


def check_variant(config: Mapping[str, Any]) -> None:
    """Checks that both readers would compute the same model.

    Args:
        config: A parsed `config.json` whose sizes are right; `Geometry.from_dict` sees to that.

    Raises:
        ConfigError: A key is missing, or has a value that one of them would not honour.
    """
    for key, rule in RULES.items():
        found = _DEFAULTS.get(key) if config.get(key) is None else config[key]
        if found is None:
            if rule.required:
                problem = "key is missing: without it the server would compute another model than the encoder"
                raise ConfigError(f"config.json: {key}", problem, f'add "{key}": {json.dumps(IMPLIED[key])}')
        elif not rule.holds(found, config):
            raise ConfigError(f"config.json: {key}", f"expected {rule.expected}, found {found!r}", _UNSUPPORTED)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and type(value) is not bool and abs(value) <= sys.float_info.max
