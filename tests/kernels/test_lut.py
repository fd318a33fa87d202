"""The look-up-table kernel against the reference, on a GPU."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from random_experts import in_kernel_order, random_codebook, random_planes
from random_parent import CONFIG
from vqserve.format.config import PROJECTIONS, VQModule
from vqserve.format.flat import flat_layout
from vqserve.format.geometry import Geometry
from vqserve.format.tiers import TIERS
from vqserve.kernels.experts import KernelExperts
from vqserve.kernels.vq_moe.cuda import moe
from vqserve.reference.dequantize import Codebook
from vqserve.reference.moe import Experts
from vqserve.reference.moe import moe as reference_moe

pytestmark = pytest.mark.gpu

SHAPES = [(384, 256), (128, 128), (640, 384), (1024, 512), (6144, 1024)]


def _experts(seed: int, hidden: int, width: int, letters: dict[str, str]) -> Experts:
    """Random bytes as codes; `letters` gives the tiers per projection."""
    generator = torch.Generator().manual_seed(seed)
    number = len(letters["gate_proj"])
    sizes = {"hidden_size": hidden, "moe_intermediate_size": width, "n_routed_experts": number}
    module = VQModule("model.layers.1.mlp.experts", letters)
    layout = flat_layout(module, Geometry.from_dict({**CONFIG, **sizes}))
    buffers = {
        name: torch.zeros(size, dtype=torch.float16 if name.endswith("scales") else torch.uint8, device="cuda")
        for name, size in layout.sizes.items()
    }
    drawn = {letter: random_codebook(tier, generator) for letter, tier in TIERS.items()}
    books = {
        letter: Codebook(book.tier, book.base.cuda(), None if book.refinement is None else book.refinement.cuda())
        for letter, book in drawn.items()
    }
    experts = Experts(layout, buffers, books)
    for expert in range(number):
        for proj in PROJECTIONS:
            slot = layout.slots[expert][proj]
            planes = random_planes(slot.tier, proj, slot.rows, slot.columns, generator)
            for part, target in experts.planes(expert, proj).items():
                target.copy_(planes[part])
    return experts


def _mixed(seed: int, number: int) -> dict[str, str]:
    chooser = random.Random(seed)
    return {proj: "".join(chooser.choice("abcd") for _ in range(number)) for proj in PROJECTIONS}


def _routed(
    seed: int, tokens: int, hidden: int, number: int, top_k: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed + 1)
    x = torch.randn(tokens, hidden, generator=generator).to(dtype)
    weights, ids = torch.rand(tokens, number, generator=generator).topk(top_k)
    return x.cuda(), weights.cuda(), ids.int().cuda()


def _run(x: Tensor, weights: Tensor, ids: Tensor, experts: KernelExperts, expert_map: Tensor | None = None) -> Tensor:
    """One call, its output poisoned first: the allocator hands the same memory out again."""
    poison = torch.full_like(x, float("nan"))
    del poison
    return moe(x, weights, ids, experts, expert_map)


def _error(found: Tensor, expected: Tensor) -> float:
    assert found.isfinite().all()
    return float((found.float() - expected.float()).norm() / expected.float().norm())


def _cases() -> Iterator[tuple[dict[str, str], str]]:
    for letter in "abcd":
        yield dict.fromkeys(PROJECTIONS, letter * 8), letter
    yield {}, "mixed"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 2, 5, 8])
@pytest.mark.parametrize(("hidden", "width"), SHAPES)
@pytest.mark.parametrize("letters", [case[0] for case in _cases()], ids=[case[1] for case in _cases()])
def test_it_computes_what_the_reference_computes(
    letters: dict[str, str], hidden: int, width: int, tokens: int, dtype: torch.dtype, seed: int
) -> None:
    experts = _experts(seed, hidden, width, letters or _mixed(seed, 8))
    routed = _routed(seed, tokens, hidden, 8, 3, dtype)
    expected = reference_moe(routed[0].float(), *routed[1:], experts)
    assert _error(_run(*routed, in_kernel_order(experts)), expected) < 2e-3


def test_what_precedes_rounding_is_far_closer_than_half_precision(seed: int) -> None:
    experts = _experts(seed, 1024, 512, _mixed(seed, 8))
    routed = _routed(seed, 3, 1024, 8, 8, torch.bfloat16)
    expected = reference_moe(routed[0].float(), *routed[1:], experts).bfloat16()
    differ = (_run(*routed, in_kernel_order(experts)) != expected).float().mean()
    assert differ < 0.01, "all but a few values round alike"


def test_experts_that_are_skipped_or_elsewhere_add_nothing(seed: int) -> None:
    experts = _experts(seed, 384, 256, _mixed(seed, 8))
    x, weights, ids = _routed(seed, 4, 384, 8, 4, torch.float16)
    ids[1] = -1
    ids[3, 2] = -1
    expert_map = torch.tensor([3, -1, 0, -1, 7, 1, -1, 2], dtype=torch.int32, device="cuda")
    for mapped in (None, expert_map):
        expected = reference_moe(x.float(), weights, ids, experts, mapped)
        found = _run(x, weights, ids, in_kernel_order(experts), mapped)
        assert (found[1] == 0).all()
        assert _error(found, expected) < 2e-3


def test_ids_may_be_64_bits_wide_and_all_tokens_may_choose_one_expert(seed: int) -> None:
    experts = _experts(seed, 384, 256, _mixed(seed, 8))
    x, weights, ids = _routed(seed, 8, 384, 8, 1, torch.float16)
    ids[:] = 5
    expected = reference_moe(x.float(), weights, ids, experts)
    assert _error(_run(x, weights, ids.long(), in_kernel_order(experts)), expected) < 2e-3


@pytest.mark.parametrize("tokens", [1, 8])
def test_a_hundred_runs_give_the_same_bits(tokens: int, seed: int) -> None:
    experts = in_kernel_order(_experts(seed, 6144, 1024, _mixed(seed, 16)))
    routed = _routed(seed, tokens, 6144, 16, 8, torch.bfloat16)
    first = _run(*routed, experts)
    assert all(torch.equal(_run(*routed, experts), first) for _ in range(100))


def test_a_call_in_a_graph_reads_the_ids_of_the_replay(seed: int) -> None:
    experts = _experts(seed, 1024, 512, _mixed(seed, 8))
    ready = in_kernel_order(experts)
    x, weights, ids = _routed(seed, 1, 1024, 8, 3, torch.float16)
    _run(x, weights, ids, ready)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = moe(moe(x, weights, ids, ready), weights, ids, ready)
    for again in range(5):
        fresh = _routed(seed + 7 * again, 1, 1024, 8, 3, torch.float16)
        for target, source in zip((x, weights, ids), fresh, strict=True):
            target.copy_(source)
        out.fill_(float("nan"))
        graph.replay()
        assert torch.equal(out, moe(moe(*fresh, ready), *fresh[1:], ready))
        expected = reference_moe(moe(*fresh, ready).float(), *fresh[1:], experts)
        assert _error(out, expected) < 2e-3


def test_a_token_that_is_not_finite_is_nan_alone_and_once(seed: int) -> None:
    experts = in_kernel_order(_experts(seed, 384, 256, _mixed(seed, 8)))
    x, weights, ids = _routed(seed, 3, 384, 8, 3, torch.bfloat16)
    clean = _run(x, weights, ids, experts)
    for value in (float("nan"), float("inf"), 1e30):
        broken = x.clone()
        broken[1, 17] = value
        found = _run(broken, weights, ids, experts)
        assert found[1].isnan().all()
        assert torch.equal(found[[0, 2]], clean[[0, 2]])
        assert torch.equal(_run(x, weights, ids, experts), clean)
