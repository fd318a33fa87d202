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
from vqserve.format.config import QuantConfig
from vqserve.format.errors import CheckpointError, ConfigError
from vqserve.format.geometry import Geometry
from vqserve.format.layout import float_dtype
from vqserve.format.variants import IMPLIED, NO_EFFECT, RULES, check_variant, completed

NAME = r"(?:self\.)?(?:hf_text_config|hf_config|text_config|config)"
READ = re.compile(rf"\b{NAME}\.([a-z_]+)\b(?!\()|(?:getattr|hasattr)\(\s*(?:[a-z_.]*\.)?{NAME},\s*[\"']([a-z_]+)[\"']")
READERS = (
    ("transformers", "models/glm_moe_dsa/modeling_glm_moe_dsa.py"),
    ("vllm", "model_executor/models/deepseek_v2.py"),
    ("vllm", "models/deepseek_v32/nvidia/model.py"),
    ("vllm", "models/deepseek_v32/attention.py"),
    ("vllm", "transformers_utils/model_arch_config_convertor.py"),
)
LISTS = re.compile(r"^ +(?:attributes|num_expert_names|names|possible_keys) = \[(.*?)\]", re.DOTALL | re.MULTILINE)
"""Of keys, the first of which that is there counts."""
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
    "json",
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
    if file.endswith("_convertor.py"):
        text = text.split("\nclass ")[1]  # the first is of every model, the others of other models
    read = {a or b for a, b in READ.findall(text)}
    read |= {key for keys in LISTS.findall(text) for key in re.findall(r'"(\w+)"', keys)}
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


ODD = JSON | st.integers() | st.sampled_from([10**14, 10**400, -(10**400), "x", ["x"], {"a": 1}, [["a"], {}], 1e308])


@given(
    changes=st.dictionaries(st.sampled_from(sorted(set(RULES) | SIZES | ELSEWHERE)), ODD, min_size=1, max_size=2),
    absent=st.sets(st.sampled_from(sorted(CONFIG)), max_size=1),
)
def test_whatever_the_keys_say_is_taken_or_refused_in_one_line(changes: dict[str, Any], absent: set[str]) -> None:
    config = {key: value for key, value in CONFIG.items() if key not in absent} | changes
    try:
        Geometry.from_dict(config)
        float_dtype(config)
        QuantConfig.from_dict(config.get("quantization_config"))
    except CheckpointError as refused:
        assert str(refused).isprintable()  # noqa: PT017 - either way is right


@pytest.mark.parametrize("value", ["a", [1], None, 10**14])
@pytest.mark.parametrize("key", ["qk_nope_head_dim", "num_hidden_layers"])
def test_a_size_is_refused_before_a_rule_computes_with_it(key: str, value: object) -> None:
    with pytest.raises(ConfigError, match=rf"^config\.json: {key}: expected an integer"):
        Geometry.from_dict({**CONFIG, "layer_types": ["indexed_attention"] * 4, key: value})


@pytest.mark.parametrize("value", [["x"], {"a": 1}, "float8_e4m3fn", "", 0, False])
@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_a_dtype_that_is_none_is_refused(key: str, value: object) -> None:
    config = {name: found for name, found in CONFIG.items() if name != "dtype"}
    with pytest.raises(ConfigError, match=r"^config\.json: dtype: expected one of bfloat16, float16, float32, found "):
        float_dtype({**config, key: value})


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
        ("routed_scaling_factor", 10**400),
        ("compression_config", {"quant_method": "compressed-tensors"}),
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
