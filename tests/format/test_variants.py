"""Every key that transformers or vLLM reads of `config.json` is decided: honoured by both, refused, or harmless."""

from __future__ import annotations

import re
from dataclasses import fields
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import GlmMoeDsaConfig

from random_parent import CONFIG
from vqserve.format.errors import ConfigError
from vqserve.format.geometry import Geometry
from vqserve.format.variants import IMPLIED, NO_EFFECT, RULES, check_variant, completed

NAME = r"(?:self\.)?(?:hf_text_config|hf_config|text_config|config)"
READ = re.compile(rf"\b{NAME}\.([a-z_]+)\b(?!\()|(?:getattr|hasattr)\(\s*(?:[a-z_.]*\.)?{NAME},\s*[\"']([a-z_]+)[\"']")
READERS = (
    ("transformers", "models/glm_moe_dsa/modeling_glm_moe_dsa.py"),
    ("vllm", "model_executor/models/deepseek_v2.py"),
    ("vllm", "models/deepseek_v32/nvidia/model.py"),
    ("vllm", "models/deepseek_v32/attention.py"),
)
SIZES = {field.name for field in fields(Geometry)}
ELSEWHERE = {
    *("model_type", "dtype", "torch_dtype", "tie_word_embeddings", "mlp_layer_types", "quantization_config"),
    *("index_topk_freq", "index_skip_topk_offset", "index_topk_pattern", "num_nextn_predict_layers"),
}
"""Checked by `Geometry` and `QuantConfig`."""
OTHERS = {
    # Not of config.json: vLLM's own configurations are called `config` too.
    *("block_size", "cache_config", "enable_eplb", "eplb_config", "model_config", "num_redundant_experts"),
    *("parallel_config", "pipeline_parallel_size", "quant_config", "scheduler_config", "speculative_config"),
    *("static_forward_context", "use_mla", "use_sequence_parallel_moe", "hf_config", "skip_final_all_reduce"),
    # Of transformers' class, not of the file.
    *("_attn_implementation", "get_text_config"),
}


def source(package: str, file: str) -> Path:
    spec = find_spec(package)
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent / file


@pytest.mark.parametrize(("package", "file"), READERS)
def test_every_key_that_a_reader_names_is_decided(package: str, file: str) -> None:
    text = source(package, file).read_text(encoding="utf-8")
    read = {a or b for a, b in READ.findall(text)}
    assert len(read) > 3
    assert read - SIZES - set(RULES) - NO_EFFECT - ELSEWHERE - OTHERS == set()


def test_every_field_of_transformers_class_is_decided() -> None:
    own = set(GlmMoeDsaConfig.__annotations__) - {"model_type", "base_model_tp_plan"}
    assert own - SIZES - set(RULES) - NO_EFFECT - ELSEWHERE == set()


JSON: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 3) | st.floats(allow_nan=True) | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=4), inner, max_size=2),
    max_leaves=4,
)


@given(key=st.sampled_from(sorted(RULES)), value=JSON)
def test_any_value_is_what_both_compute_or_is_refused_with_its_key(key: str, value: Any) -> None:
    config = {**CONFIG, key: value}
    fine = value is None or RULES[key].holds(value, config)
    if value is None and (RULES[key].required or key == "num_key_value_heads"):
        fine = False
    if fine:
        check_variant(config)
    else:
        with pytest.raises(ConfigError, match=rf"^config\.json: {key}: ") as error:
            Geometry.from_dict(config)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("scoring_func", "softmax"),
        ("topk_method", "greedy"),
        ("norm_topk_prob", False),
        ("n_group", 8),
        ("indexer_rope_interleave", False),
        ("rope_parameters", {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}),
        ("rope_theta", 5e5),
        ("rope_scaling", {"type": "yarn", "factor": 4.0}),
        ("sliding_window", 4096),
        ("num_experts", 8),
        ("num_key_value_heads", 1),
        ("layer_types", ["full_attention"] * 4),
        ("rms_norm_eps", 0),
        ("routed_scaling_factor", float("inf")),
    ],
)
def test_what_the_two_readers_would_compute_differently_is_refused(key: str, value: object) -> None:
    with pytest.raises(ConfigError, match=rf"^config\.json: {key}: expected .*, found "):
        Geometry.from_dict({**CONFIG, key: value})


def test_what_transformers_implies_is_written_out_for_vllm() -> None:
    bare = {key: value for key, value in CONFIG.items() if key not in IMPLIED}
    with pytest.raises(ConfigError, match=r'scoring_func: key is missing: .*; add "scoring_func": "sigmoid"'):
        Geometry.from_dict(bare)
    whole = completed(bare)
    assert {key: whole[key] for key in IMPLIED} == IMPLIED
    assert Geometry.from_dict(whole) == Geometry.from_dict(CONFIG)
    with pytest.raises(ConfigError, match="scoring_func: expected"):
        Geometry.from_dict(completed({**bare, "scoring_func": "softmax"}))


@pytest.mark.parametrize("name", ["indexed_attention", "deepseek_sparse_attention"])
def test_both_names_of_indexed_attention_are_known(name: str) -> None:
    check_variant({**CONFIG, "layer_types": [name] * CONFIG["num_hidden_layers"]})
    with pytest.raises(ConfigError, match="layer_types"):
        check_variant({**CONFIG, "layer_types": [name] * (CONFIG["num_hidden_layers"] - 1)})
