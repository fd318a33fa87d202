from __future__ import annotations

from typing import Any

import pytest

from random_parent import CONFIG
from vqserve.format.errors import ConfigError
from vqserve.format.geometry import Geometry


def test_the_small_model_s_geometry_is_read() -> None:
    geometry = Geometry.from_dict(CONFIG)
    assert list(geometry.moe_layers) == [1, 2, 3]
    assert geometry.experts_modules[0] == "model.layers.1.mlp.experts"
    assert geometry.qk_head_dim == 256
    assert geometry.indexer_types == ("full",) * 4
    assert list(geometry.mtp_layers) == []


def test_rows_and_columns_of_a_projection_are_out_and_in_features() -> None:
    geometry = Geometry.from_dict({**CONFIG, "hidden_size": 384, "moe_intermediate_size": 128})
    assert geometry.expert_shape("gate_proj") == geometry.expert_shape("up_proj") == (128, 384)
    assert geometry.expert_shape("down_proj") == (384, 128)


def _without(key: str) -> dict[str, Any]:
    return {name: value for name, value in CONFIG.items() if name != key}


@pytest.mark.parametrize(
    ("extra", "types"),
    [
        ({}, ["full"] * 4),
        ({"index_topk_freq": 4, "index_skip_topk_offset": 2}, ["full", "full", "shared", "shared"]),
        ({"index_topk_freq": 2, "index_skip_topk_offset": 1}, ["full", "shared", "full", "shared"]),
        ({"index_topk_pattern": "FSSF"}, ["full", "shared", "shared", "full"]),
        (
            {"indexer_types": ["full", "shared", "full", "full"], "index_topk_freq": 9},
            ["full", "shared", "full", "full"],
        ),
    ],
)
def test_indexer_types_are_derived_as_transformers_does(extra: dict[str, Any], types: list[str]) -> None:
    from transformers import GlmMoeDsaConfig

    geometry = Geometry.from_dict({**CONFIG, **extra})
    assert list(geometry.indexer_types) == types
    assert list(geometry.indexer_types) == GlmMoeDsaConfig(**{**CONFIG, **extra}).indexer_types


@pytest.mark.parametrize(
    "key", ["hidden_size", "n_routed_experts", "q_lora_rank", "index_n_heads", "first_k_dense_replace"]
)
def test_a_missing_size_is_named(key: str) -> None:
    with pytest.raises(ConfigError, match=rf"config\.json: {key}: key is missing"):
        Geometry.from_dict(_without(key))


@pytest.mark.parametrize("value", [0, -256, 256.0, "256", None, True, [256]])
def test_a_size_that_is_no_positive_integer_is_refused(value: object) -> None:
    with pytest.raises(ConfigError, match=r"config\.json: vocab_size: expected an integer from 1 to "):
        Geometry.from_dict({**CONFIG, "vocab_size": value})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model_type", "llama"),
        ("attention_bias", True),
        ("mlp_bias", True),
        ("hidden_act", "gelu"),
        ("moe_layer_freq", 2),
        ("tie_word_embeddings", True),
        ("hidden_size", 192),
        ("moe_intermediate_size", 64),
        ("num_experts_per_tok", 17),
        ("first_k_dense_replace", 4),
        ("num_hidden_layers", 10**12),
        ("first_k_dense_replace", -1),
        ("num_nextn_predict_layers", -1),
        ("num_nextn_predict_layers", "1"),
        ("mlp_layer_types", ["dense", "sparse", "dense", "sparse"]),
        ("mlp_layer_types", ["dense"]),
        ("indexer_types", ["full"] * 3),
        ("indexer_types", ["shared"] + ["full"] * 3),
        ("indexer_types", ["full", "half", "full", "full"]),
        ("indexer_types", ["full", [], "full", "full"]),
        ("indexer_types", "full"),
        ("index_topk_pattern", "FSX"),
        ("index_topk_pattern", 4),
        ("index_topk_freq", 0),
    ],
)
def test_a_model_that_would_be_computed_wrongly_is_refused_with_the_key(key: str, value: object) -> None:
    with pytest.raises(ConfigError, match=rf"^config\.json: {key}: "):
        Geometry.from_dict({**CONFIG, key: value})


def test_something_that_is_no_object_is_refused() -> None:
    with pytest.raises(ConfigError, match="expected an object, found list"):
        Geometry.from_dict([])
