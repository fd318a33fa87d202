"""`vqserve bench model` without a GPU: the configurations that it serves and the bytes that a token reads of them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from vqserve.bench.command import real_config
from vqserve.bench.engine import answer, decoded
from vqserve.bench.model import ALONE, OURS, STOCK, floors, grouped, stock_config, targets, vq_config
from vqserve.checkpoint.assume import SEED_MIX
from vqserve.format.errors import UsageError


def test_a_token_reads_what_the_sizes_say() -> None:
    served = vq_config(real_config(), SEED_MIX, layers=78, of_ranks=2)
    found = floors(served, ranks=1, copy=1e6)  # so microseconds are bytes
    hidden, width, moe_layers = 6144, 1024, 75
    bits = 0.27 * 1.125 + 0.59 * 2.125 + 0.14 * 3.125
    assert found["experts"] == pytest.approx(moe_layers * 8 * 3 * width * hidden * bits / 8, rel=0.01)
    attention = hidden * (2048 + 576) + 2048 * 32 * 256 + 32 * 256 * hidden
    linears = 78 * attention + 3 * hidden * (moe_layers * width + 3 * 6144)
    assert found["4-bit linears"] == pytest.approx(linears * (4 + 16 / 128) / 8, rel=0.01)
    plain = 78 * 512 * 32 * (192 + 256) + moe_layers * 256 * hidden + 77440 * hidden
    assert found["bf16 products"] == pytest.approx(plain * 2, rel=0.01)


def test_the_stock_model_has_the_same_layers_and_fewer_experts() -> None:
    config = real_config()
    ours, stock = vq_config(config, SEED_MIX, 10, 2), stock_config(config, 10, 2, experts=32)
    differ = {key for key in ours if ours[key] != stock[key]}
    assert differ == {"n_routed_experts", "quantization_config"}


@pytest.mark.parametrize(("layers", "of_ranks", "said"), [(3, 1, "--layers 3"), (79, 1, "--layers 79"), (10, 3, "3")])
def test_a_model_that_cannot_be_is_refused(layers: int, of_ranks: int, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        vq_config(real_config(), SEED_MIX, layers, of_ranks)


def test_kernels_are_told_apart_by_what_they_are_for() -> None:
    kernels = {"gate_up": [2.0, 5.0], "void vllm::moe::grouped_topk": [1.0, 1.0], "marlin::Marlin<1>": [1.0, 2.0]}
    found = grouped({**kernels, "void vllm::cross_device_reduce_1stage<2>": [1.0, 3.0], "whatever": [1.0, 4.0]})
    assert {name: part["us"] for name, part in found.items() if part["us"]} == {
        "all-reduce": 3.0,
        "router": 1.0,
        "experts": 5.0,
        "4-bit linears": 2.0,
        "other": 4.0,
    }


def test_a_decode_step_is_told_from_the_prompt_before_it_however_long_ranks_waited_for_each_other_there() -> None:
    prompt = {"all_reduce": [90000.0, 5.0], "gemm": [400.0]}
    whole = {"all_reduce": [20.0, 5.0, 6.0, 8.0, 7.0, 9.0], "gemm": [500.0], "gemv": [3.0, 4.0]}
    assert decoded(whole, prompt, steps=2) == {"all_reduce": [2.0, 15.0], "gemv": [1.0, 3.5]}


@pytest.mark.slow
def test_streams_of_which_the_first_ends_before_the_last_begins_are_said_to_be() -> None:
    steps = [[("0", True)], [("1", True)]]
    core = SimpleNamespace(
        add_request=lambda *_: None,
        has_unfinished_requests=lambda: bool(steps),
        step=lambda: [SimpleNamespace(request_id=name, finished=ended) for name, ended in steps.pop(0)],
    )
    with pytest.raises(ValueError, match="2 streams never decode together"):
        answer(SimpleNamespace(llm_engine=core), [[1], [1]], 1)


def run_of(seconds: float, *held: int) -> dict[str, Any]:
    return {"seconds per step": {"decode, context 128": seconds}, "weight bytes per rank": held}


def test_a_single_stream_is_held_to_stock_to_one_rank_alone_and_ranks_to_equal_shares() -> None:
    found = targets({OURS: run_of(0.010, 1000, 1020), STOCK: run_of(0.0096, 1), ALONE: run_of(0.0084, 1000)})
    assert [(round(target["found"], 2), target["met"]) for target in found] == [
        (0.96, True),
        (0.84, False),
        (0.02, False),
    ]
    assert targets({OURS: run_of(0.010, 1000)}) == []
