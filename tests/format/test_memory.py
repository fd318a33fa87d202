"""What the estimate of memory says of itself; that a running vLLM agrees see vllm_plugin."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import vqserve
from random_parent import CONFIG
from vqserve.checkpoint.assume import SEED_MIX, assumed
from vqserve.format.config import PROJECTIONS, QuantConfig, VQModule
from vqserve.format.errors import ConfigError, UsageError
from vqserve.format.geometry import Geometry
from vqserve.format.memory import ATTENTIONS, Attention, expert_bytes, memory

DATA = Path(vqserve.__file__).parent / "data"
EVEN = dict.fromkeys("abcd", 0.25)
ENCODED = assumed(CONFIG, EVEN)


@pytest.fixture(scope="module")
def real() -> dict[str, Any]:
    """The real geometry, in the tiers of the model card."""
    return assumed(json.loads((DATA / "glm-5.2.json").read_text(encoding="utf-8")), SEED_MIX)


def test_the_real_model_caches_what_its_layers_and_indexers_do(real: dict[str, Any]) -> None:
    assert memory(real).token_bytes == 78 * (512 + 64) * 2
    assert memory(real, attention="sparse").token_bytes == 78 * 656 + 21 * 132


def test_the_real_models_experts_are_as_large_as_their_bits_say(real: dict[str, Any]) -> None:
    weights = 75 * 256 * 3 * 2048 * 6144
    shares = {"a": 69, "c": 151, "d": 36}
    bits = sum(count * {"a": 1.125, "c": 2.125, "d": 3.125}[letter] for letter, count in shares.items()) / 256
    split = memory(real).weights.split
    assert sum(size for part, size in split.items() if part.startswith("experts")) == weights * bits / 8


@pytest.mark.parametrize("whole_experts", [False, True], ids=["split", "whole"])
@pytest.mark.parametrize("ranks", [1, 2])
def test_tiers_of_the_experts_sum_up_to_their_planes(ranks: int, whole_experts: bool) -> None:
    planes = memory(ENCODED, ranks=ranks, whole_experts=whole_experts).weights.split
    tiers = [expert_bytes(ENCODED, rank, ranks, whole_experts) for rank in range(ranks)]
    fullest = max(sum(each.values()) for each in tiers)
    assert fullest == sum(planes[f"experts: {plane}"] for plane in ("codes", "refinement", "scales"))
    assert set().union(*tiers) == {1, 1.5, 2, 3}


def test_ranks_split_the_experts_and_each_hold_the_router() -> None:
    one, two = memory(ENCODED).weights, memory(ENCODED, ranks=2).weights
    assert two.split == {part: size // 2 for part, size in one.split.items()}
    assert two.whole == one.whole
    assert {"router", "norms", "rotary table", "experts: codebooks"} < set(one.whole)


def test_the_fullest_of_ranks_with_whole_experts_counts() -> None:
    geometry = Geometry.from_dict(CONFIG)
    modules = tuple(VQModule(name, dict.fromkeys(PROJECTIONS, "a" * 8 + "d" * 8)) for name in geometry.experts_modules)
    config = {**CONFIG, "quantization_config": QuantConfig(modules).to_dict()}
    whole = memory(config, ranks=2, whole_experts=True).weights.split
    shared = memory(config, ranks=2).weights.split
    assert "experts: refinement" in whole
    assert whole["experts: codes"] == memory(config).weights.split["experts: codes"] * 2 // 3, "d costs twice a"
    assert whole["experts: codes"] > shared["experts: codes"]
    assert whole["experts: refinement"] == 2 * shared["experts: refinement"]


def test_only_sparse_attention_loads_the_indexer() -> None:
    assert "indexer" not in memory(ENCODED).weights.whole
    assert memory(ENCODED, attention="sparse").weights.whole["indexer"] > 0


def test_multi_token_prediction_is_not_loaded(real: dict[str, Any]) -> None:
    without = {**real, "num_nextn_predict_layers": 0}
    assert memory(real).weights == memory(without).weights


def test_a_cpu_holds_embeddings_and_head_twice_where_it_packs_them() -> None:
    cuda, cpu = memory(ENCODED).weights.split, memory(ENCODED, platform="cpu").weights.split
    assert {part: size // cuda[part] for part, size in cpu.items()} == {
        part: 2 if part in ("embeddings", "lm_head") else 1 for part in cuda
    }
    assert memory(ENCODED, platform="cpu", avx512=False).weights.split == cuda
    full = memory(ENCODED, platform="cpu", avx512=False, element_bytes=4).weights.split
    assert full == memory(ENCODED, platform="cpu", element_bytes=4).weights.split


def test_float32_doubles_what_is_not_quantized_and_the_cache() -> None:
    half = memory(ENCODED, platform="cpu", dequantized_spine=True)
    full = memory(ENCODED, platform="cpu", dequantized_spine=True, element_bytes=4)
    assert full.token_bytes == 2 * half.token_bytes
    for held, wanted in ((half.weights.split, full.weights.split), (half.weights.whole, full.weights.whole)):
        for part, size in held.items():
            if part == "router":  # its bias is in float32 either way
                assert size < wanted[part] < 2 * size
            else:
                assert wanted[part] == (size if part.startswith("experts") else 2 * size), part


def test_a_dequantized_spine_takes_four_times_its_codes() -> None:
    packed, plain = memory(ENCODED).weights, memory(ENCODED, dequantized_spine=True).weights
    scales = 16 / 128  # bits: one of 16 for 128 weights, which are dropped
    for held, wanted in ((packed.split, plain.split), (packed.whole, plain.whole)):
        assert wanted["spine: 4 bit"] == held["spine: 4 bit"] * 16 / (4 + scales)


def test_a_parent_is_counted_as_it_is() -> None:
    weights = memory(CONFIG).weights
    assert weights.split["experts: not quantized"] == 3 * 16 * 3 * 256 * 256 * 2
    assert not any("4 bit" in part or "code" in part for part in (*weights.split, *weights.whole))


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_the_longest_context_fits_and_one_token_more_does_not(real: dict[str, Any], attention: Attention) -> None:
    plan = memory(real, ranks=2, attention=attention)
    available = plan.needed(20_000) + 3
    longest = plan.longest_context(available)
    assert plan.needed(longest) <= available < plan.needed(longest + 1)
    assert longest == 20_000
    assert plan.longest_context(plan.needed(0) - 1) == 0
    assert plan.longest_context(1 << 50) == 202_752, "what the model was made for"


def test_a_model_that_does_not_split_is_refused() -> None:
    with pytest.raises(UsageError, match="num_attention_heads = 2 is not a multiple"):
        memory(ENCODED, ranks=3)


def test_a_damaged_configuration_is_refused() -> None:
    with pytest.raises(ConfigError, match="quant_method"):
        memory({**CONFIG, "quantization_config": {}})
