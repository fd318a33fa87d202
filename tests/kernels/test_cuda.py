"""The kernels in CUDA C++ against the reference, on a GPU."""

from __future__ import annotations

import random
from collections.abc import Iterator
from types import ModuleType

import pytest
import torch
from torch import Tensor

from random_experts import random_codebook, random_planes
from random_parent import CONFIG
from vqserve.format.config import PROJECTIONS, VQModule
from vqserve.format.flat import flat_layout
from vqserve.format.geometry import Geometry
from vqserve.format.tiers import TIERS
from vqserve.kernels.experts import KernelExperts
from vqserve.kernels.vq_gemm import cuda as gather
from vqserve.kernels.vq_gemm.grouping import Grouping
from vqserve.kernels.vq_moe import cuda as lut
from vqserve.reference.dequantize import Codebook
from vqserve.reference.moe import Experts
from vqserve.reference.moe import moe as reference_moe

pytestmark = pytest.mark.gpu

KERNELS = pytest.mark.parametrize("kernel", [lut, gather], ids=["lut", "gather"])
SHAPES = [(384, 256), (128, 128), (640, 384), (1024, 512), (6144, 1024)]


def _experts(seed: int, hidden: int, width: int, letters: dict[str, str]) -> Experts:
    """Random bytes as codes; `letters` gives the tiers per projection."""
    generator = torch.Generator().manual_seed(seed)
    number = len(letters["gate_proj"])
    sizes = {
        "hidden_size": hidden,
        "moe_intermediate_size": width,
        "n_routed_experts": number,
        "num_experts_per_tok": 1,
    }
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


def _run(
    kernel: ModuleType, routed: tuple[Tensor, ...], experts: KernelExperts, expert_map: Tensor | None = None
) -> Tensor:
    """One call, all its memory poisoned first: the allocator hands the same out again."""
    poison = [torch.full((1 << 20,), float("nan"), device="cuda"), torch.full_like(routed[0], float("nan"))]
    del poison
    out: Tensor = kernel.moe(*routed, experts, expert_map)
    return out


def _error(found: Tensor, expected: Tensor) -> float:
    assert found.isfinite().all()
    return float((found.float() - expected.float()).norm() / expected.float().norm())


def _cases() -> Iterator[tuple[dict[str, str], str]]:
    for letter in "abcd":
        yield dict.fromkeys(PROJECTIONS, letter * 8), letter
    yield {}, "mixed"


def _counts() -> Iterator[tuple[ModuleType, int]]:
    yield from ((lut, tokens) for tokens in (1, 2, 5, 8))
    yield from ((gather, tokens) for tokens in (1, 18, 33, 400))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("kernel", "tokens"), list(_counts()), ids=lambda value: getattr(value, "__name__", value))
@pytest.mark.parametrize(("hidden", "width"), SHAPES)
@pytest.mark.parametrize("letters", [case[0] for case in _cases()], ids=[case[1] for case in _cases()])
def test_it_computes_what_the_reference_computes(
    letters: dict[str, str],
    hidden: int,
    width: int,
    kernel: ModuleType,
    tokens: int,
    dtype: torch.dtype,
    seed: int,
) -> None:
    experts = _experts(seed, hidden, width, letters or _mixed(seed, 8))
    routed = _routed(seed, tokens, hidden, 8, 3, dtype)
    expected = reference_moe(routed[0].float(), *routed[1:], experts)
    assert _error(_run(kernel, routed, KernelExperts.of(experts)), expected) < 2e-3


@pytest.mark.parametrize("tokens", [1, 18, 33, 400])
@pytest.mark.parametrize(("hidden", "width"), SHAPES)
def test_blocks_as_on_chips_with_less_shared_memory_compute_the_same(
    hidden: int, width: int, tokens: int, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    experts = _experts(seed, hidden, width, _mixed(seed, 8))
    routed = _routed(seed, tokens, hidden, 8, 3, torch.bfloat16)
    expected = reference_moe(routed[0].float(), *routed[1:], experts)
    for capabilities in ((), (torch.cuda.get_device_capability(),)):
        monkeypatch.setattr(gather, "_ROOMY", capabilities)
        assert _error(_run(gather, routed, KernelExperts.of(experts)), expected) < 2e-3


@pytest.mark.parametrize("tokens", [1, 18, 33, 400])
def test_groups_of_scale_0_between_large_and_small_ones_add_nothing(tokens: int, seed: int) -> None:
    experts = _experts(seed, 640, 256, _mixed(seed, 8))
    generator = torch.Generator().manual_seed(seed)
    for expert in range(8):
        for proj in PROJECTIONS:
            scales = experts.planes(expert, proj)["scales"]
            kinds = torch.randint(0, 6, scales.shape, generator=generator).cuda()
            scales[kinds == 0] = 0.0
            scales[kinds == 1] *= 2.0**-9
            scales[kinds == 2] *= -1.0
    routed = _routed(seed, tokens, 640, 8, 3, torch.float16)
    expected = reference_moe(routed[0].float(), *routed[1:], experts)
    assert _error(_run(gather, routed, KernelExperts.of(experts)), expected) < 2e-3
    for expert in range(8):
        experts.planes(expert, "up_proj")["scales"].zero_()
    assert float(_run(gather, routed, KernelExperts.of(experts)).abs().max()) < 1e-12


def test_more_tokens_than_the_kernels_can_address_take_several_runs(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    experts = KernelExperts.of(_experts(seed, 640, 256, _mixed(seed, 8)))
    x, weights, ids = _routed(seed, 21, 640, 8, 3, torch.float16)
    monkeypatch.setattr(gather, "MAX_BYTES", 2 * 6 * 640)
    alone = [_run(gather, (x[i : i + 1], weights[i : i + 1], ids[i : i + 1]), experts) for i in range(21)]
    assert _error(_run(gather, (x, weights, ids), experts), torch.cat(alone)) < 1e-3


@pytest.mark.parametrize("tokens", [1, 70, 130])
@pytest.mark.parametrize("capabilities", [(), ((9, 0),)])
def test_a_matrix_of_one_group_of_columns_and_shares_just_above_a_block(
    capabilities: tuple[tuple[int, int], ...], tokens: int, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gather, "_ROOMY", capabilities)
    experts = _experts(seed, 1152, 128, _mixed(seed, 2))
    routed = _routed(seed, tokens, 1152, 2, 1, torch.bfloat16)
    routed[2][: tokens // 2 + 1] = 0
    expected = reference_moe(routed[0].float(), *routed[1:], experts)
    assert _error(_run(gather, routed, KernelExperts.of(experts)), expected) < 2e-3


@pytest.mark.parametrize(("kernel", "share"), [(lut, 0.01), (gather, 0.25)], ids=["lut", "gather"])
def test_what_precedes_rounding_is_closer_than_half_precision(kernel: ModuleType, share: float, seed: int) -> None:
    experts = _experts(seed, 1024, 512, _mixed(seed, 8))
    routed = _routed(seed, 3, 1024, 8, 8, torch.bfloat16)
    expected = reference_moe(routed[0].float(), *routed[1:], experts).bfloat16()
    differ = (_run(kernel, routed, KernelExperts.of(experts)) != expected).float().mean()
    assert differ < share, "most values round alike"


@KERNELS
def test_experts_that_are_skipped_or_elsewhere_add_nothing(kernel: ModuleType, seed: int) -> None:
    experts = _experts(seed, 384, 256, _mixed(seed, 8))
    x, weights, ids = _routed(seed, 4, 384, 8, 4, torch.float16)
    ids[1] = -1
    ids[3, 2] = -1
    expert_map = torch.tensor([3, -1, 0, -1, 7, 1, -1, 2], dtype=torch.int32, device="cuda")
    for mapped in (None, expert_map):
        expected = reference_moe(x.float(), weights, ids, experts, mapped)
        found = _run(kernel, (x, weights, ids), KernelExperts.of(experts), mapped)
        assert (found[1] == 0).all()
        assert _error(found, expected) < 2e-3


@pytest.mark.parametrize(("kernel", "tokens"), [(lut, 8), (gather, 8), (gather, 1100)])
def test_ids_may_be_64_bits_wide_and_all_tokens_may_choose_one_expert(
    kernel: ModuleType, tokens: int, seed: int
) -> None:
    experts = _experts(seed, 384, 256, _mixed(seed, 8))
    x, weights, ids = _routed(seed, tokens, 384, 8, 1, torch.float16)
    ids[:] = 5
    expected = reference_moe(x.float(), weights, ids, experts)
    assert _error(_run(kernel, (x, weights, ids.long()), KernelExperts.of(experts)), expected) < 2e-3


@pytest.mark.parametrize(("kernel", "tokens"), [(lut, 1), (lut, 8), (gather, 1), (gather, 200)])
def test_a_hundred_runs_give_the_same_bits(kernel: ModuleType, tokens: int, seed: int) -> None:
    experts = KernelExperts.of(_experts(seed, 6144, 1024, _mixed(seed, 16)))
    routed = _routed(seed, tokens, 6144, 16, 8, torch.bfloat16)
    first = _run(kernel, routed, experts)
    assert all(torch.equal(_run(kernel, routed, experts), first) for _ in range(100))


def test_a_small_workspace_gives_the_same_bits(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    experts = KernelExperts.of(_experts(seed, 640, 256, _mixed(seed, 8)))
    routed = _routed(seed, 20, 640, 8, 4, torch.float16)
    whole = _run(gather, routed, experts)
    monkeypatch.setattr(gather, "WORKSPACE", 1)
    assert torch.equal(_run(gather, routed, experts), whole)


def test_the_sort_in_one_block_is_torchs(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for pairs, number, block in ((1, 8, 8), (7, 3, 8), (1000, 5, 16), (1024, 256, 8), (1023, 512, 32)):
        ids = torch.randint(-1, number, (pairs, 1), generator=generator).cuda()
        found, expected = gather.group(ids, None, number, block), Grouping.of(ids, None, number, block)
        here = int((ids >= 0).sum())
        used = expected.expert >= 0
        assert torch.equal(found.order[:here], expected.order[:here])
        assert torch.equal(found.expert, expected.expert)
        assert torch.equal(found.first[used], expected.first[used])
        assert torch.equal(found.last[used], expected.last[used])


@pytest.mark.parametrize(("kernel", "tokens"), [(lut, 1), (gather, 12), (gather, 600)])
def test_a_call_in_a_graph_reads_the_ids_of_the_replay(kernel: ModuleType, tokens: int, seed: int) -> None:
    experts = _experts(seed, 1024, 512, _mixed(seed, 8))
    ready = KernelExperts.of(experts)
    x, weights, ids = _routed(seed, tokens, 1024, 8, 3, torch.float16)
    _run(kernel, (x, weights, ids), ready)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = kernel.moe(kernel.moe(x, weights, ids, ready), weights, ids, ready)
    for again in range(5):
        fresh = _routed(seed + 7 * again, tokens, 1024, 8, 3, torch.float16)
        for target, source in zip((x, weights, ids), fresh, strict=True):
            target.copy_(source)
        out.fill_(float("nan"))
        graph.replay()
        once = kernel.moe(*fresh, ready)
        assert torch.equal(out, kernel.moe(once, *fresh[1:], ready))
        assert _error(out, reference_moe(once.float(), *fresh[1:], experts)) < 2e-3


@KERNELS
def test_a_token_that_is_not_finite_spoils_itself_alone_and_once(kernel: ModuleType, seed: int) -> None:
    experts = KernelExperts.of(_experts(seed, 384, 256, _mixed(seed, 8)))
    x, weights, ids = _routed(seed, 3, 384, 8, 3, torch.bfloat16)
    clean = _run(kernel, (x, weights, ids), experts)
    for value in (float("nan"), float("inf"), 1e30):
        broken = x.clone()
        broken[1, 17] = value
        found = _run(kernel, (broken, weights, ids), experts)
        assert not found[1].isfinite().any()
        assert torch.equal(found[[0, 2]], clean[[0, 2]])
        assert torch.equal(_run(kernel, (x, weights, ids), experts), clean)
