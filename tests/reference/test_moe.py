"""The definition of the routed experts, against one dense product over all of them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import silu

from random_experts import GEOMETRY, random_experts
from vqserve.format.config import PROJECTIONS
from vqserve.reference.moe import Experts, moe

EXPERTS, CHOSEN = GEOMETRY.n_routed_experts, 3


def dense(x: Tensor, weights: Tensor, ids: Tensor, experts: Experts) -> Tensor:
    """Every expert on every token, weighted by 0 where it was not chosen."""
    gate, up, down = (
        torch.stack([experts.weight(expert, proj) for expert in range(EXPERTS)]).double() for proj in PROJECTIONS
    )
    inner = silu(torch.einsum("eic,tc->tei", gate, x.double())) * torch.einsum("eic,tc->tei", up, x.double())
    share = torch.zeros(len(x), EXPERTS, dtype=torch.float64)
    for choice in range(ids.shape[1]):
        chosen = ids[:, choice] >= 0
        share[chosen, ids[chosen, choice].long()] += weights[chosen, choice].double()
    return torch.einsum("te,eci,tei->tc", share, down, inner)


def routed(seed: int, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed + 1)
    x = torch.randn(tokens, GEOMETRY.hidden_size, generator=generator)
    weights, ids = torch.rand(tokens, EXPERTS, generator=generator).topk(CHOSEN)
    ids[torch.rand(ids.shape, generator=generator) < 0.2] = -1
    return x, weights, ids.int()


@pytest.mark.parametrize("tokens", [0, 1, 9])
def test_the_sum_is_that_of_all_experts_weighted(tokens: int, seed: int) -> None:
    experts, (x, weights, ids) = random_experts(seed), routed(seed, tokens)
    torch.testing.assert_close(moe(x.double(), weights, ids, experts), dense(x, weights, ids, experts))
    for dtype in (torch.float32, torch.bfloat16):
        out = moe(x.to(dtype), weights, ids, experts)
        assert torch.equal(out, moe(x.to(dtype).double(), weights, ids, experts).to(dtype))


def test_experts_of_other_ranks_are_left_to_them(seed: int) -> None:
    x, weights, ids = routed(seed, 5)
    total = torch.zeros(x.shape, dtype=torch.float64)
    for mine in ([5, 0, 3], [1, 2], [4, 6, 7]):
        expert_map = torch.full((EXPERTS,), -1, dtype=torch.int32)
        expert_map[mine] = torch.arange(len(mine), dtype=torch.int32)
        total += moe(x.double(), weights, ids, random_experts(seed, experts=mine), expert_map)
    torch.testing.assert_close(total, moe(x.double(), weights, ids, random_experts(seed)))


def test_the_buffers_views_are_the_planes_themselves(seed: int) -> None:
    experts = random_experts(seed)
    experts.planes(3, "up_proj")["codes"].fill_(7)
    slot = experts.layout.slots[3]["up_proj"]
    offset, length = slot.span("codes")
    assert (experts.buffers["gate_up_codes"][offset : offset + length] == 7).all()
