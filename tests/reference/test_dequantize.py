from __future__ import annotations

import struct

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from random_experts import random_codebook, random_planes
from vqserve.format.config import PROJECTIONS
from vqserve.format.tiers import TIERS, Tier
from vqserve.reference.dequantize import Codebook, dequantize
from vqserve.reference.matmul import matmul
from vqserve.reference.pack import unpack, unpack_scales


def _single(value: float) -> float:
    result: float = struct.unpack("<f", struct.pack("<f", value))[0]
    return result


@settings(max_examples=25)
@given(
    tier=st.sampled_from(list(TIERS.values())),
    proj=st.sampled_from(PROJECTIONS),
    rows=st.integers(1, 4),
    groups=st.integers(1, 3),
    seed=st.integers(0, 2**32 - 1),
)
def test_every_weight_is_what_the_formula_says(tier: Tier, proj: str, rows: int, groups: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    codebook = random_codebook(tier, generator)
    planes = random_planes(tier, proj, rows, 128 * groups, generator)
    base, refinement = unpack(planes, tier, proj)
    scales = unpack_scales(planes["scales"], proj)
    weights = dequantize(planes, codebook, proj)
    assert weights.dtype == torch.float32
    for row in range(rows):
        for column in range(128 * groups):
            word = codebook.base[base[row, column // tier.d], column % tier.d].item()
            if refinement is not None and codebook.refinement is not None:
                word = _single(word + codebook.refinement[refinement[row, column // tier.d], column % tier.d].item())
            # An fp32 product of an fp32 and an fp16 number is exact in fp64, so it is rounded once here too.
            assert weights[row, column].item() == _single(word * scales[row, column // 128].item())


@pytest.mark.parametrize("tier", TIERS.values(), ids=TIERS)
def test_a_table_has_every_sum_in_the_order_of_codes(tier: Tier, seed: int) -> None:
    codebook = random_codebook(tier, torch.Generator().manual_seed(seed))
    table = codebook.table()
    assert table.shape == (256 * max(tier.refinement_rows, 1), tier.d)
    if codebook.refinement is None:
        assert torch.equal(table, codebook.base.float())
    else:
        assert torch.equal(table[16 * 200 + 7], codebook.base[200].float() + codebook.refinement[7].float())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_are_rounded_to_the_dtype_asked_for_once(dtype: torch.dtype, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    codebook = random_codebook(TIERS["d"], generator)
    planes = random_planes(TIERS["d"], "down_proj", 7, 256, generator)
    rounded = dequantize(planes, codebook, "down_proj", dtype)
    assert rounded.dtype == dtype
    assert torch.equal(rounded, dequantize(planes, codebook, "down_proj").to(dtype))


@pytest.mark.parametrize("proj", PROJECTIONS)
@pytest.mark.parametrize("tier", TIERS.values(), ids=TIERS)
def test_a_product_is_that_of_the_weights_to_fp32_rounding(tier: Tier, proj: str, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    codebook, planes = random_codebook(tier, generator), random_planes(tier, proj, 24, 384, generator)
    x = torch.randn(5, 384, generator=generator)
    exact = x.double() @ dequantize(planes, codebook, proj).double().t()
    # 384 products of order 1 / sqrt(384) each, every addition rounded to 2**-24 of a partial sum of order 1.
    torch.testing.assert_close(matmul(x, planes, codebook, proj).double(), exact, rtol=0, atol=2e-5)
    half = matmul(x.bfloat16(), planes, codebook, proj)
    assert half.dtype == torch.bfloat16
    assert torch.equal(half, matmul(x.bfloat16().float(), planes, codebook, proj).bfloat16())


def test_a_scale_that_is_infinite_shows_and_does_not_spread(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    codebook: Codebook = random_codebook(TIERS["a"], generator)
    planes = random_planes(TIERS["a"], "up_proj", 4, 256, generator)
    planes["scales"][2, 1] = float("inf")
    bad = ~dequantize(planes, codebook, "up_proj").isfinite()
    assert bad[2, 128:].all()
    assert bad.sum() == 128
