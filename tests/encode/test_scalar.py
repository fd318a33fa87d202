"""Scalar grids, and the spine's GPTQ layout bit by bit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from seeds import FIXED
from vqserve.encode.scalar import encode_spine, minmax_grid, mse_grid, spine_grid
from vqserve.format.layout import gptq_specs
from vqserve.format.tiers import GROUP
from vqserve.reference.gptq import dequantize_gptq


def random_problem(seed: int, rows: int = 64, columns: int = 256) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator) * (1 + torch.rand(rows, 1, generator=generator))
    inputs = torch.randn(1000, columns, generator=generator) @ torch.randn(columns, columns, generator=generator)
    return weight, inputs.t() @ inputs / 1000


def output_error(weight: Tensor, rounded: Tensor, hessian: Tensor) -> float:
    error = weight - rounded
    return float(((error @ hessian) * error).sum() / ((weight @ hessian) * weight).sum())


def test_spine_words_hold_eight_columns_each_lowest_bits_first(seed: int) -> None:
    weight, hessian = random_problem(seed)
    tensors = encode_spine(weight, hessian)
    for spec in gptq_specs("x", *weight.shape):
        assert tuple(tensors[spec.name.removeprefix("x.")].shape) == spec.shape
    words, scales = tensors["qweight"], tensors["scales"]
    rebuilt = torch.empty_like(weight)
    for column in range(weight.shape[1]):
        for row in range(weight.shape[0]):
            nibble = (int(words[column // 8, row]) >> 4 * (column % 8)) & 15
            rebuilt[row, column] = (nibble - 8) * float(scales[column // GROUP, row])
    assert torch.equal(dequantize_gptq(tensors["qweight"], tensors["scales"]), rebuilt)
    assert (tensors["qzeros"] == 0x77777777).all(), "zero point 8, stored less one"


@FIXED
def test_spine_dequantizes_close_to_the_weight(seed: int) -> None:
    weight, hessian = random_problem(seed)
    tensors = encode_spine(weight, hessian)
    rounded = dequantize_gptq(tensors["qweight"], tensors["scales"])
    alone = spine_grid(weight[None], torch.ones(1, 256)).nearest(weight[None])[0]
    assert output_error(weight, rounded, hessian) < 0.01
    assert output_error(weight, rounded, hessian) < 0.8 * output_error(weight, alone, hessian)


def test_spine_uses_all_sixteen_levels_and_survives_a_group_of_zeros(seed: int) -> None:
    weight, hessian = random_problem(seed)
    weight[3, :GROUP] = 0
    tensors = encode_spine(weight, hessian)
    assert tensors["qweight"].view(torch.uint8).bitwise_and(15).unique().tolist() == list(range(16))
    assert (dequantize_gptq(tensors["qweight"], tensors["scales"])[3, :GROUP].abs() < 1e-3).all()


def test_spine_of_tiny_weights_is_as_close_as_that_of_ordinary_ones(seed: int) -> None:
    weight, hessian = random_problem(seed)
    shrunk = 2.0**-30  # bf16 steps go far below the smallest normal fp16
    plain, tiny = encode_spine(weight, hessian), encode_spine(weight * shrunk, hessian)
    assert torch.equal(tiny["qweight"], plain["qweight"])
    assert torch.equal(tiny["scales"].float(), plain["scales"].float() * shrunk)


@pytest.mark.parametrize("bits", [1, 2, 3])
def test_mse_grid_beats_minmax_grid_and_compensation_beats_rounding(bits: int, seed: int) -> None:
    weight, hessian = random_problem(seed)
    weight, hessian = weight[None], hessian[None]
    mse, minmax = mse_grid(weight, bits), minmax_grid(weight, bits)
    assert (mse.nearest(weight) - weight).square().sum() < (minmax.nearest(weight) - weight).square().sum()
    for grid in (mse, minmax):
        rounded, compensated = grid.nearest(weight), grid.compensate(weight, hessian)
        assert output_error(weight[0], compensated[0], hessian[0]) < output_error(weight[0], rounded[0], hessian[0])
        # Compensation may choose other levels, but only levels of the grid.
        torch.testing.assert_close(grid.nearest(compensated), compensated, rtol=1e-5, atol=1e-5)


def test_one_bit_mse_grid_is_plus_minus_one_step(seed: int) -> None:
    weight, _ = random_problem(seed)
    grid = mse_grid(weight[None], 1)
    values = grid.nearest(weight[None])[0].unflatten(1, (-1, GROUP))
    torch.testing.assert_close(values.abs(), values.abs().amax(2, keepdim=True).expand_as(values))
    # The best s for +-s is the mean of |w|; the search is in steps of 2.5 % of the largest weight.
    torch.testing.assert_close(
        values[..., 0].abs(), weight.unflatten(1, (-1, GROUP)).abs().mean(2), rtol=0.1, atol=0.02
    )


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_minmax_grid_reaches_from_the_least_to_the_greatest_weight(bits: int, seed: int) -> None:
    weight, _ = random_problem(seed)
    groups = weight.unflatten(1, (-1, GROUP))
    rounded = minmax_grid(weight[None], bits).nearest(weight[None])[0].unflatten(1, (-1, GROUP))
    torch.testing.assert_close(rounded.amin(2), groups.amin(2), rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(rounded.amax(2), groups.amax(2), rtol=1e-2, atol=1e-2)
