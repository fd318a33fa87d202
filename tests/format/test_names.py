from __future__ import annotations

import pytest

from vqserve.format.names import (
    codebook_name,
    expert_tensor,
    experts_module,
    layer_of,
    parse_expert_tensor,
    parse_experts_module,
)


def test_an_expert_tensor_s_name_is_taken_apart_as_it_was_built() -> None:
    name = expert_tensor(experts_module(12), 255, "down_proj", "scales")
    assert name == "model.layers.12.mlp.experts.255.down_proj.scales"
    assert parse_expert_tensor(name) == ("model.layers.12.mlp.experts", 255, "down_proj", "scales")


def test_codebooks_lie_below_the_experts_of_their_layer() -> None:
    assert codebook_name(experts_module(3), "a") == "model.layers.3.mlp.experts.routed_experts.codebook_a"
    refinement = codebook_name(experts_module(3), "d", refinement=True)
    assert refinement == "model.layers.3.mlp.experts.routed_experts.codebook_d_refinement"


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.3.mlp.shared_experts.gate_proj.weight",
        "model.layers.3.mlp.experts.routed_experts.codebook_a",
        "model.layers.03.mlp.experts.1.gate_proj.codes",
        "model.layers.3.mlp.experts.-1.gate_proj.codes",
        "model.layers.3.mlp.experts.1.gate_proj.codes\n",
        "x.model.layers.3.mlp.experts.1.gate_proj.codes",
    ],
)
def test_other_names_are_not_taken_for_expert_tensors(name: str) -> None:
    assert parse_expert_tensor(name) is None


def test_the_layer_is_read_off_a_name_that_has_one() -> None:
    assert parse_experts_module("model.layers.77.mlp.experts") == 77
    assert parse_experts_module("model.layers.77.mlp.experts.0") is None
    assert layer_of("model.layers.5.self_attn.o_proj.qweight") == 5
    assert layer_of("model.embed_tokens.weight") is None
