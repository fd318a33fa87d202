from __future__ import annotations

from typing import Any

import pytest
import torch

from random_parent import CONFIG
from vqserve.format.config import PROJECTIONS, QuantConfig, Spine, VQModule
from vqserve.format.errors import ConfigError, UsageError
from vqserve.format.geometry import Geometry
from vqserve.format.layout import (
    check_shardable,
    checkpoint_specs,
    float_dtype,
    parent_specs,
    shard_slice,
    spine_modules,
    spine_shapes,
)
from vqserve.format.names import experts_module
from vqserve.format.tiers import TIERS

GLM_5_2 = {
    **CONFIG,
    "vocab_size": 154880,
    "hidden_size": 6144,
    "intermediate_size": 12288,
    "moe_intermediate_size": 2048,
    "num_hidden_layers": 78,
    "num_attention_heads": 64,
    "num_key_value_heads": 64,
    "n_routed_experts": 256,
    "num_experts_per_tok": 8,
    "first_k_dense_replace": 3,
    "q_lora_rank": 2048,
    "index_n_heads": 32,
    "index_topk_freq": 4,
    "num_nextn_predict_layers": 1,
    "max_position_embeddings": 202752,
}
FOREIGN = {
    **CONFIG,
    "vocab_size": 100,
    "hidden_size": 384,
    "intermediate_size": 640,
    "moe_intermediate_size": 128,
    "num_hidden_layers": 5,
    "num_attention_heads": 3,
    "num_key_value_heads": 3,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_shared_experts": 2,
    "first_k_dense_replace": 2,
    "q_lora_rank": 96,
    "indexer_types": ["full", "shared", "full", "full", "shared"],
}

THREE_HEADS = {**CONFIG, "num_attention_heads": 3, "num_key_value_heads": 3}


def _vq(layer: int, letters: str) -> VQModule:
    return VQModule(experts_module(layer), dict.fromkeys(PROJECTIONS, letters))


def _checkpoint(config: dict[str, Any], letters: str, spine: tuple[str, ...] = ()) -> dict[str, Any]:
    modules = tuple(_vq(layer, letters) for layer in Geometry.from_dict(config).moe_layers)
    return {**config, "quantization_config": QuantConfig(modules, Spine(spine) if spine else None).to_dict()}


@pytest.mark.parametrize("config", [CONFIG, FOREIGN, GLM_5_2], ids=["small", "foreign", "GLM-5.2"])
def test_a_parent_s_tensors_are_those_of_transformers_model_class(config: dict[str, Any]) -> None:
    from transformers import GlmMoeDsaConfig, GlmMoeDsaForCausalLM

    with torch.device("meta"):
        model = GlmMoeDsaForCausalLM(GlmMoeDsaConfig(**config))
    expected: dict[str, tuple[int, ...]] = {}
    for name, tensor in model.state_dict().items():
        stem = name.rpartition(".")[0]
        # The class holds the experts of a layer in two tensors; hub checkpoints hold them one by one.
        if name.endswith("experts.gate_up_proj"):
            for expert in range(tensor.shape[0]):
                half = (tensor.shape[1] // 2, tensor.shape[2])
                expected[f"{stem}.{expert}.gate_proj.weight"] = expected[f"{stem}.{expert}.up_proj.weight"] = half
        elif name.endswith("experts.down_proj"):
            for expert in range(tensor.shape[0]):
                expected[f"{stem}.{expert}.down_proj.weight"] = tuple(tensor.shape[1:])
        else:
            expected[name] = tuple(tensor.shape)
    specs = parent_specs(Geometry.from_dict(config))
    assert {name: spec.shape for name, spec in specs.items() if spec.required} == expected


def test_multi_token_prediction_tensors_may_be_there_and_need_not() -> None:
    with_mtp = parent_specs(Geometry.from_dict({**CONFIG, "num_nextn_predict_layers": 1}))
    extra = {name for name, spec in with_mtp.items() if not spec.required}
    assert extra == set(with_mtp) - set(parent_specs(Geometry.from_dict(CONFIG)))
    assert all(name.startswith("model.layers.4.") for name in extra)
    assert with_mtp["model.layers.4.eh_proj.weight"].shape == (256, 512)
    assert "model.layers.4.mlp.experts.15.down_proj.weight" in extra
    assert "model.layers.4.self_attn.indexer.wk.weight" in extra


def test_experts_of_the_multi_token_prediction_layer_can_be_quantized_and_are_then_required() -> None:
    config = _checkpoint({**CONFIG, "num_nextn_predict_layers": 1}, "abcd" * 4)
    config["quantization_config"]["modules"].append(_vq(4, "a" * 16).to_dict())
    specs = checkpoint_specs(config)
    assert specs["model.layers.4.mlp.experts.0.gate_proj.codes"].required
    assert "model.layers.4.mlp.experts.0.gate_proj.weight" not in specs


def test_every_expert_tensor_has_the_shape_of_its_tier_and_layout() -> None:
    specs = checkpoint_specs(_checkpoint({**CONFIG, "hidden_size": 384, "n_routed_experts": 4}, "abcd"))
    stem = "model.layers.1.mlp.experts"
    shapes = {name.removeprefix(f"{stem}."): (spec.dtype, *spec.shape) for name, spec in specs.items() if stem in name}
    rows = {
        **{f"0.{part}": shape for part, shape in {"codes": ("U8", 256, 48), "scales": ("F16", 256, 3)}.items()},
        "1.codes": ("U8", 256, 48),
        "1.refinement": ("U8", 256, 24),
        "1.scales": ("F16", 256, 3),
        "2.codes": ("U8", 256, 96),
        "2.scales": ("F16", 256, 3),
        "3.codes": ("U8", 256, 96),
        "3.refinement": ("U8", 256, 48),
        "3.scales": ("F16", 256, 3),
    }
    groups = {
        "0.codes": ("U8", 2, 384, 16),
        "0.scales": ("F16", 2, 384),
        "1.codes": ("U8", 2, 384, 16),
        "1.refinement": ("U8", 2, 384, 8),
        "1.scales": ("F16", 2, 384),
        "2.codes": ("U8", 2, 384, 32),
        "2.scales": ("F16", 2, 384),
        "3.codes": ("U8", 2, 384, 32),
        "3.refinement": ("U8", 2, 384, 16),
        "3.scales": ("F16", 2, 384),
    }
    expected: dict[str, tuple[object, ...]] = {}
    for proj, table in (("gate_proj", rows), ("up_proj", rows), ("down_proj", groups)):
        expected |= {key.replace(".", f".{proj}."): shape for key, shape in table.items()}
    for letter, tier in TIERS.items():
        expected[f"routed_experts.codebook_{letter}"] = ("F16", 256, tier.d)
        if tier.refinement_rows:
            expected[f"routed_experts.codebook_{letter}_refinement"] = ("F16", 16, tier.d)
    assert shapes == expected


def test_codebooks_are_there_for_exactly_the_tiers_that_occur() -> None:
    specs = checkpoint_specs(_checkpoint(CONFIG, "acca" * 4))
    books = {name.rpartition(".")[2] for name in specs if "codebook" in name}
    assert books == {"codebook_a", "codebook_c"}


def test_glm_5_2_at_two_bits_has_the_bytes_of_its_bits() -> None:
    config = _checkpoint(GLM_5_2, "c" * 256, spine_modules(Geometry.from_dict(GLM_5_2)))
    specs = checkpoint_specs(config)
    experts = sum(
        spec.nbytes
        for name, spec in specs.items()
        if ".mlp.experts." in name and "codebook" not in name and spec.required
    )
    assert experts * 8 == 75 * 256 * 3 * 2048 * 6144 * 2.125
    assert specs["model.layers.3.mlp.experts.255.down_proj.codes"].shape == (16, 6144, 32)
    assert specs["model.layers.77.self_attn.o_proj.qweight"].shape == (64 * 256 // 8, 6144)
    assert "model.layers.3.self_attn.indexer.wq_b.qweight" not in specs, "layer 3 shares layer 2's indexer"


def test_the_spine_s_linear_layers_are_chosen_by_shape_and_fusion() -> None:
    small = spine_modules(Geometry.from_dict(CONFIG))
    assert [name for name in small if "layers.1." in name] == [
        f"model.layers.1.{leaf}"
        for leaf in (
            "self_attn.q_a_proj",
            "self_attn.q_b_proj",
            "self_attn.kv_a_proj_with_mqa",
            "self_attn.o_proj",
            "self_attn.indexer.wq_b",
            "mlp.shared_experts.gate_proj",
            "mlp.shared_experts.up_proj",
            "mlp.shared_experts.down_proj",
        )
    ]
    # 96 is no multiple of 64 nor of 128: q_a_proj stays, kv_a_proj_with_mqa with it, and what reads its 96 columns.
    foreign = {
        name.rpartition("self_attn.")[2] for name in spine_modules(Geometry.from_dict(FOREIGN)) if "self_attn" in name
    }
    assert foreign == {"o_proj"}


def test_a_spine_module_s_weight_gives_way_to_its_gptq_tensors() -> None:
    specs = checkpoint_specs(_checkpoint(CONFIG, "a" * 16, ("model.layers.0.self_attn.o_proj",)))
    stem = "model.layers.0.self_attn.o_proj."
    found = {name.removeprefix(stem): (spec.dtype, spec.shape) for name, spec in specs.items() if name.startswith(stem)}
    assert found == {
        "qweight": ("I32", (64, 256)),
        "scales": ("BF16", (4, 256)),
        "qzeros": ("I32", (4, 32)),
    }


@pytest.mark.parametrize(
    ("spine", "reason"),
    [
        (("model.layers.0.self_attn.kv_b_proj",), "kv_b_proj is not a linear layer"),
        (("lm_head",), "lm_head is not a linear layer"),
        (("model.layers.9.self_attn.o_proj",), "not a linear layer"),
        (("model.layers.0.self_attn.q_a_proj",), "is listed, model.layers.0.self_attn.kv_a_proj_with_mqa is not"),
        (("model.layers.1.mlp.shared_experts.up_proj",), "shared_experts.gate_proj is not"),
    ],
)
def test_a_spine_that_vllm_could_not_load_is_refused(spine: tuple[str, ...], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        checkpoint_specs(_checkpoint(CONFIG, "a" * 16, spine))


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (_vq(0, "a" * 16), "layers 1..3 only"),
        (_vq(4, "a" * 16), "layers 1..3 only"),
        (_vq(1, "a" * 8), "16 letters, found 8"),
    ],
)
def test_experts_that_the_model_does_not_have_are_refused(module: VQModule, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        checkpoint_specs({**CONFIG, "quantization_config": QuantConfig((module,)).to_dict()})


def test_layers_that_are_not_listed_keep_the_parent_s_experts() -> None:
    specs = checkpoint_specs({**CONFIG, "quantization_config": QuantConfig((_vq(2, "a" * 16),)).to_dict()})
    assert specs["model.layers.1.mlp.experts.0.gate_proj.weight"].shape == (256, 256)
    assert "model.layers.2.mlp.experts.0.gate_proj.weight" not in specs


def test_kept_tensors_may_have_any_float_dtype_and_the_router_s_bias_is_fp32() -> None:
    specs = parent_specs(Geometry.from_dict(CONFIG), float_dtype({"torch_dtype": "float16"}))
    norm, bias = specs["model.norm.weight"], specs["model.layers.1.mlp.gate.e_score_correction_bias"]
    assert (norm.dtype, bias.dtype) == ("F16", "F32")
    assert {norm.dtype, *norm.other_dtypes} == {bias.dtype, *bias.other_dtypes} == {"BF16", "F16", "F32"}
    with pytest.raises(ConfigError, match="float8_e4m3"):
        float_dtype({"dtype": "float8_e4m3"})


@pytest.mark.parametrize("size", [1, 2, 3, 6])
def test_the_shards_of_all_ranks_cover_an_axis_once(size: int) -> None:
    covered = [at for rank in range(size) for at in range(12)[shard_slice(12, rank, size)]]
    assert covered == list(range(12))


def test_the_small_model_shards_over_two_ranks_and_glm_5_2_over_sixteen() -> None:
    check_shardable(Geometry.from_dict(CONFIG), 2, Spine(spine_modules(Geometry.from_dict(CONFIG))))
    check_shardable(Geometry.from_dict(GLM_5_2), 16, Spine(spine_modules(Geometry.from_dict(GLM_5_2))))


@pytest.mark.parametrize(
    ("config", "size", "reason"),
    [
        (CONFIG, 4, "num_attention_heads = 2 is not a multiple of it; use 2"),
        ({**CONFIG, "moe_intermediate_size": 384}, 2, "moe_intermediate_size = 384 does not split into 2 parts"),
        ({**CONFIG, "intermediate_size": 384}, 2, r"mlp.down_proj has 384 columns, .* 2 parts"),
        (THREE_HEADS, 3, "vocab_size, from 640 padded to a multiple of 64, = 640 is not a multiple of it; use 1"),
        ({**THREE_HEADS, "vocab_size": 192}, 3, "intermediate_size = 512 is not a multiple of it; use 1"),
        (CONFIG, 0, "expected at least 1; use 1"),
    ],
)
def test_a_size_that_does_not_divide_is_refused_with_the_reason(config: dict[str, Any], size: int, reason: str) -> None:
    geometry = Geometry.from_dict(config)
    with pytest.raises(UsageError, match=reason):
        check_shardable(geometry, size, Spine(spine_modules(geometry)))


def test_whole_experts_need_not_split() -> None:
    geometry = Geometry.from_dict({**CONFIG, "moe_intermediate_size": 128, "n_shared_experts": 2})
    check_shardable(geometry, 2, Spine(spine_modules(geometry)), whole_experts=True)
    with pytest.raises(UsageError, match="moe_intermediate_size = 128 does not split into 2 parts"):
        check_shardable(geometry, 2, Spine(spine_modules(geometry)))


def test_more_ranks_than_whole_experts_are_refused() -> None:
    sizes = {"num_attention_heads": 8, "num_key_value_heads": 8, "intermediate_size": 1024, "n_routed_experts": 4}
    sizes |= {"moe_intermediate_size": 1024}
    geometry = Geometry.from_dict({**CONFIG, **sizes})
    with pytest.raises(UsageError, match="n_routed_experts = 4 is not one for each rank; use 4"):
        check_shardable(geometry, 8, Spine(spine_modules(geometry)), whole_experts=True)


def test_what_4_bit_can_store_does_not_depend_on_what_is_listed() -> None:
    geometry = Geometry.from_dict(CONFIG)
    assert tuple(spine_shapes(geometry)) == spine_modules(geometry)
    assert spine_shapes(geometry)["model.layers.0.mlp.down_proj"] == (256, 512)
