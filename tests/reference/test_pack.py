from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vqserve.format.config import PROJECTIONS
from vqserve.format.layout import plane_shape, shard_slice
from vqserve.format.tiers import TIERS, Tier
from vqserve.reference.pack import pack, pack_scales, unpack, unpack_scales

tiers = st.sampled_from(list(TIERS.values()))
projections = st.sampled_from(PROJECTIONS)
seeds = st.integers(0, 2**32 - 1)


def _codes(tier: Tier, rows: int, columns: int, seed: int) -> tuple[torch.Tensor, torch.Tensor | None]:
    generator, shape = torch.Generator().manual_seed(seed), (rows, columns // tier.d)
    base = torch.randint(tier.base_rows, shape, generator=generator)
    return base, torch.randint(16, shape, generator=generator) if tier.refinement_rows else None


def _assert_same(left: torch.Tensor | None, right: torch.Tensor | None) -> None:
    assert (left is None) == (right is None)
    assert left is None or right is None or torch.equal(left, right)


@given(tier=tiers, proj=projections, rows=st.integers(1, 70), groups=st.integers(1, 5), seed=seeds)
def test_what_is_packed_is_unpacked_unchanged(tier: Tier, proj: str, rows: int, groups: int, seed: int) -> None:
    base, refinement = _codes(tier, rows, 128 * groups, seed)
    planes = pack(base, refinement, tier, proj)
    for part, plane in planes.items():
        assert plane.dtype == torch.uint8
        assert plane.shape == plane_shape(tier, proj, part, rows, 128 * groups)
    again = unpack(planes, tier, proj)
    _assert_same(again[0], base)
    _assert_same(again[1], refinement)


@given(tier=tiers, proj=projections, rows=st.integers(1, 20), groups=st.integers(1, 4), seed=seeds)
def test_every_pattern_of_bytes_is_valid_codes(tier: Tier, proj: str, rows: int, groups: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    planes = {
        part: torch.randint(256, plane_shape(tier, proj, part, rows, 128 * groups), generator=generator).to(torch.uint8)
        for part in (("codes", "refinement") if tier.refinement_rows else ("codes",))
    }
    packed = pack(*unpack(planes, tier, proj), tier, proj)
    assert set(packed) == set(planes)
    for part, plane in planes.items():
        assert torch.equal(packed[part], plane)


@given(tier=tiers, proj=projections, size=st.integers(1, 4), seed=seeds)
def test_a_shard_of_the_planes_is_the_planes_of_the_shard(tier: Tier, proj: str, size: int, seed: int) -> None:
    rows, columns = 3 * size, 2 * 128 * size
    base, refinement = _codes(tier, rows, columns, seed)
    planes = pack(base, refinement, tier, proj)
    for rank in range(size):
        if proj == "down_proj":
            width = columns // tier.d // size
            cut = (slice(None), slice(rank * width, (rank + 1) * width))
        else:
            cut = (slice(rank * 3, (rank + 1) * 3), slice(None))
        expected = pack(base[cut], None if refinement is None else refinement[cut], tier, proj)
        for part, plane in planes.items():
            assert torch.equal(plane[shard_slice(plane.shape[0], rank, size)], expected[part])


@pytest.mark.parametrize("proj", PROJECTIONS)
def test_scales_are_stored_in_the_layout_of_their_codes(proj: str) -> None:
    scales = torch.rand(5, 3).half()
    stored = pack_scales(scales, proj)
    assert stored.shape == plane_shape(TIERS["a"], proj, "scales", 5, 384)
    assert torch.equal(unpack_scales(stored, proj), scales)


@pytest.mark.parametrize(("base", "refinement"), [(256, 0), (-1, 0), (0, 16), (0, -1)])
def test_a_code_out_of_range_is_refused(base: int, refinement: int) -> None:
    codes = torch.zeros(1, 32, dtype=torch.int64)
    with pytest.raises(ValueError, match="codes: expected 0"):
        pack(codes + base, codes + refinement, TIERS["d"], "up_proj")


def test_a_refinement_too_many_or_too_few_is_refused() -> None:
    with pytest.raises(ValueError, match="tier d: expected refinement codes"):
        pack(torch.zeros(1, 32, dtype=torch.int64), None, TIERS["d"], "up_proj")
    with pytest.raises(ValueError, match="tier c: takes no refinement codes"):
        pack(torch.zeros(1, 32, dtype=torch.int64), torch.zeros(1, 32), TIERS["c"], "up_proj")
