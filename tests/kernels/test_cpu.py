"""The CPU's experts against the definition: the same weights bit for bit, sums to fp32 rounding."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from random_experts import GEOMETRY, random_experts
from vqserve.format.config import PROJECTIONS
from vqserve.kernels.vq_moe.cpu import TabledExperts, moe
from vqserve.reference.moe import Experts
from vqserve.reference.moe import moe as reference_moe

HIDDEN, EXPERTS, CHOSEN = GEOMETRY.hidden_size, GEOMETRY.n_routed_experts, 3


def _assert_close(found: Tensor, expected: Tensor) -> None:
    """Equal to the rounding of fp32 sums of up to 384 products, two projections deep, of values of order 1."""
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def _routed(seed: int, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens [T, H], their experts' weights and ids [T, k]."""
    generator = torch.Generator().manual_seed(seed + 1)
    x = torch.randn(tokens, HIDDEN, generator=generator)
    weights, ids = torch.rand(tokens, EXPERTS, generator=generator).topk(CHOSEN)
    return x, weights, ids.int()


def _tabled(seed: int, **shard: Any) -> TabledExperts:
    found = random_experts(seed, **shard)
    return TabledExperts(found.layout, found.buffers, found.codebooks)


def test_the_fast_look_up_gives_the_bits_of_dequantize(seed: int) -> None:
    experts = _tabled(seed)
    tiers = set()
    for expert in range(EXPERTS):
        for proj in PROJECTIONS:
            tiers.add((proj, experts.layout.slots[expert][proj].tier.id))
            assert torch.equal(experts.weight(expert, proj), Experts.weight(experts, expert, proj))
    assert len(tiers) == 12, "all four tiers of all three projections"


@pytest.mark.parametrize("tokens", [1, 2, 17, 64])
def test_the_sum_is_that_of_the_definition_to_fp32_rounding(seed: int, tokens: int) -> None:
    experts, (x, weights, ids) = _tabled(seed), _routed(seed, tokens)
    expected = reference_moe(x, weights, ids, experts)
    assert expected.abs().mean() > 0.1
    _assert_close(moe(x, weights, ids, experts), expected)


def test_half_precision_input_is_computed_in_fp32_and_rounded_once(seed: int) -> None:
    experts, (x, weights, ids) = _tabled(seed), _routed(seed, 9)
    for dtype in (torch.bfloat16, torch.float16):
        out = moe(x.to(dtype), weights, ids, experts)
        assert out.dtype == dtype
        assert torch.equal(out, moe(x.to(dtype).float(), weights, ids, experts).to(dtype))


def test_two_runs_give_the_same_bits(seed: int) -> None:
    experts, (x, weights, ids) = _tabled(seed), _routed(seed, 64)
    assert torch.equal(moe(x, weights, ids, experts), moe(x, weights, ids, experts))


def test_a_token_s_sum_does_not_depend_on_its_neighbors_beyond_rounding(seed: int) -> None:
    experts, (x, weights, ids) = _tabled(seed), _routed(seed, 33)
    together = moe(x, weights, ids, experts)
    alone = torch.cat([moe(x[at : at + 1], weights[at : at + 1], ids[at : at + 1], experts) for at in range(33)])
    _assert_close(together, alone)


def test_a_choice_of_minus_one_is_skipped(seed: int) -> None:
    experts, (x, weights, ids) = _tabled(seed), _routed(seed, 5)
    skipped, unweighted = ids.clone(), weights.clone()
    skipped[2] = -1
    skipped[4, 1] = -1
    unweighted[2], unweighted[4, 1] = 0, 0
    out = moe(x, weights, skipped, experts)
    assert (out[2] == 0).all()
    _assert_close(out, moe(x, unweighted, ids, experts))


def test_no_tokens_give_no_sums(seed: int) -> None:
    x, weights, ids = _routed(seed, 0)
    assert moe(x, weights, ids, _tabled(seed)).shape == (0, HIDDEN)


def test_experts_spread_over_ranks_add_up_to_the_whole(seed: int) -> None:
    whole, (x, weights, ids) = _tabled(seed), _routed(seed, 21)
    ids[3, 0] = -1
    total = torch.zeros(x.shape)
    for mine in ([5, 0, 3], [1, 2], [4, 6, 7]):
        expert_map = torch.full((EXPERTS,), -1, dtype=torch.int32)
        expert_map[mine] = torch.arange(len(mine), dtype=torch.int32)
        total += moe(x, weights, ids, _tabled(seed, experts=mine), expert_map)
    _assert_close(total, moe(x, weights, ids, whole))


def test_tensor_parallel_shards_add_up_to_the_whole(seed: int) -> None:
    whole, (x, weights, ids) = _tabled(seed), _routed(seed, 21)
    shards = [_tabled(seed, tp_size=2, tp_rank=rank) for rank in (0, 1)]
    for shard in shards:
        assert all(2 * shard.buffers[name].numel() == whole.buffers[name].numel() for name in whole.buffers)
    total = sum((moe(x, weights, ids, shard) for shard in shards), torch.zeros(x.shape))
    _assert_close(total, moe(x, weights, ids, whole))
