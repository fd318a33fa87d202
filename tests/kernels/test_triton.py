"""The Triton kernels against the reference: on a GPU, or interpreted on a CPU (`TRITON_INTERPRET=1`)."""

from __future__ import annotations

import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from random_experts import GEOMETRY, random_experts
from vqserve.kernels.experts import KernelExperts
from vqserve.kernels.moe import moe
from vqserve.kernels.vq_gemm import triton as kernel
from vqserve.reference.dequantize import Codebook
from vqserve.reference.moe import Experts
from vqserve.reference.moe import moe as reference_moe

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
pytestmark = [] if INTERPRETED else [pytest.mark.gpu]

DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
# Rounding of the result to its dtype, mostly; of fp32, prefill's rounding of activations and h to tf32 (measured: up to
# 1.0e-3 on an H100). The interpreter cuts bf16 off where a GPU rounds: twice the error.
LIMIT = {torch.float32: 2e-3, torch.float16: 1e-3, torch.bfloat16: 4e-3 if INTERPRETED else 2e-3}


def _experts(seed: int, experts: list[int] | None = None, tp_size: int = 1, tp_rank: int = 0) -> Experts:
    mine = random_experts(seed, experts, tp_size, tp_rank)
    buffers = {name: buffer.to(DEVICE) for name, buffer in mine.buffers.items()}
    books = {
        letter: Codebook(
            book.tier, book.base.to(DEVICE), None if book.refinement is None else book.refinement.to(DEVICE)
        )
        for letter, book in mine.codebooks.items()
    }
    return Experts(mine.layout, buffers, books)


def _routed(seed: int, tokens: int, dtype: torch.dtype, top_k: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed + 1)
    x = torch.randn(tokens, GEOMETRY.hidden_size, generator=generator).to(dtype)
    weights, ids = torch.rand(tokens, GEOMETRY.n_routed_experts, generator=generator).topk(top_k)
    return x.to(DEVICE), weights.to(DEVICE), ids.int().to(DEVICE)


def _error(found: Tensor, expected: Tensor) -> float:
    return float((found.float() - expected).norm() / expected.norm())


def _run(routed: tuple[Tensor, ...], experts: Experts, expert_map: Tensor | None = None) -> Tensor:
    x, weights, ids = routed
    return kernel.moe(x, weights, ids, KernelExperts.of(experts), expert_map)


@pytest.mark.parametrize("dtype", LIMIT, ids=str)
@pytest.mark.parametrize("tokens", [1, 3, 17, 64] if INTERPRETED else [1, 3, 17, 64, 513])
def test_the_sum_is_the_references_to_rounding(dtype: torch.dtype, tokens: int, seed: int) -> None:
    experts, routed = _experts(seed), _routed(seed, tokens, dtype)
    expected = reference_moe(routed[0].float(), *routed[1:], experts)
    assert _error(_run(routed, experts), expected) < LIMIT[dtype]


def test_two_runs_give_the_same_bits(seed: int) -> None:
    experts, routed = _experts(seed), _routed(seed, 3, torch.bfloat16)
    assert torch.equal(_run(routed, experts), _run(routed, experts))


def test_a_choice_of_minus_one_is_skipped_and_a_token_without_choices_is_zero(seed: int) -> None:
    experts, routed = _experts(seed), _routed(seed, 3, torch.float16)
    routed[2][1] = -1
    routed[2][2, 1] = -1
    out = _run(routed, experts)
    assert (out[1] == 0).all()
    assert _error(out, reference_moe(routed[0].float(), *routed[1:], experts)) < LIMIT[torch.float16]


def test_experts_of_other_ranks_are_skipped(seed: int) -> None:
    mine = [5, 0, 3]
    expert_map = torch.full((GEOMETRY.n_routed_experts,), -1, dtype=torch.int32)
    expert_map[mine] = torch.arange(len(mine), dtype=torch.int32)
    experts, routed, expert_map = _experts(seed, mine), _routed(seed, 4, torch.float16), expert_map.to(DEVICE)
    routed[2][0, 0], routed[2][0, 1] = -1, 5
    expected = reference_moe(routed[0].float(), *routed[1:], experts, expert_map)
    assert _error(_run(routed, experts, expert_map), expected) < LIMIT[torch.float16]


def test_tensor_parallel_shards_add_up_to_the_whole(seed: int) -> None:
    routed = _routed(seed, 2, torch.float16)
    expected = reference_moe(routed[0].float(), *routed[1:], _experts(seed))
    shards = [_run(routed, _experts(seed, tp_size=2, tp_rank=rank)).float() for rank in (0, 1)]
    assert _error(shards[0] + shards[1], expected) < LIMIT[torch.float16]


def test_all_tokens_on_one_expert_leave_the_others_without_any(seed: int) -> None:
    experts, routed = _experts(seed), _routed(seed, 70, torch.float16, top_k=1)
    routed[2].fill_(6)
    expected = reference_moe(routed[0].float(), *routed[1:], experts)
    assert _error(_run(routed, experts), expected) < LIMIT[torch.float16]


def test_a_small_workspace_gives_the_same_bits(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    experts, routed = _experts(seed), _routed(seed, 5, torch.float16)
    whole = _run(routed, experts)
    monkeypatch.setattr(kernel, "WORKSPACE", 1)
    assert torch.equal(_run(routed, experts), whole)


@settings(max_examples=4 if INTERPRETED else 100)
@given(
    seed=st.integers(0, 2**31),
    tokens=st.integers(0, 20 if INTERPRETED else 600),
    top_k=st.integers(1, 8),
    dtype=st.sampled_from([torch.float16, torch.bfloat16]),
    long=st.booleans(),
)
def test_any_codes_tokens_and_choices_give_the_references_sum(
    seed: int, tokens: int, top_k: int, dtype: torch.dtype, long: bool
) -> None:
    experts = _experts(seed)
    x, weights, ids = _routed(seed, tokens, dtype, top_k)
    generator = torch.Generator().manual_seed(seed)
    ids = torch.where(torch.rand(ids.shape, generator=generator).to(DEVICE) < 0.2, -1, ids)
    routed = (x, weights, ids.long() if long else ids)
    out = moe(*routed, KernelExperts.of(experts))
    expected = reference_moe(x.float(), *routed[1:], experts)
    assert out.shape == x.shape
    assert float((out.float() - expected).norm()) <= 1.2 * LIMIT[dtype] * float(expected.norm())


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [8, 9, 200])
def test_a_captured_graph_follows_new_input(tokens: int, seed: int) -> None:
    experts, routed = _experts(seed), _routed(seed, tokens, torch.bfloat16)
    taken = KernelExperts.of(experts)
    moe(*routed, taken)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = moe(*routed, taken)
    for old, new in zip(routed, _routed(seed + 1, tokens, torch.bfloat16), strict=True):
        old.copy_(new)
    out.fill_(float("nan"))
    graph.replay()
    assert torch.equal(out, moe(*routed, taken))
    assert _error(out, reference_moe(routed[0].float(), *routed[1:], experts)) < LIMIT[torch.bfloat16]
