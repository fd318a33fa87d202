"""Scale refit: exact least squares, never worse, and worth its while."""

from __future__ import annotations

import torch
from torch import Tensor

from seeds import FIXED
from vqserve.encode.assign import factorize
from vqserve.encode.codebook import fit_codebooks, normalized_vectors
from vqserve.encode.scales import initial_scales, refit, row_errors, scaled
from vqserve.encode.vq import encode_matrices
from vqserve.format.tiers import GROUP

ROWS, COLUMNS = 7, 384


def random_problem(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Weights, unscaled codewords that resemble them, and H; two matrices."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(2, ROWS, COLUMNS, generator=generator)
    unit = weight + 0.5 * torch.randn(2, ROWS, COLUMNS, generator=generator)
    inputs = torch.randn(2, 900, COLUMNS, generator=generator)
    inputs = inputs @ torch.randn(2, COLUMNS, COLUMNS, generator=generator)
    hessian = inputs.mT @ inputs / 900
    # A random mixing can be so close to singular that its square is not positive in fp32.
    return weight, unit, hessian + 1e-3 * hessian.diagonal(dim1=1, dim2=2).mean() * torch.eye(COLUMNS)


def test_refit_finds_the_least_squares_solution_of_every_row(seed: int) -> None:
    weight, unit, hessian = random_problem(seed)
    found = refit(weight, unit, hessian, torch.ones(2, ROWS, COLUMNS // GROUP))
    for at in range(2):
        half = torch.linalg.cholesky(hessian[at].double())
        for row in range(ROWS):
            # One column per group: that group's codewords, seen through H^(1/2).
            design = torch.block_diag(*unit[at, row].double().split(GROUP)) @ half
            wanted = torch.linalg.lstsq(design.t(), half.t() @ weight[at, row].double()).solution
            torch.testing.assert_close(found[at, row].double(), wanted, rtol=2e-3, atol=2e-3)  # fp16 holds 11 bits


def test_refit_never_raises_the_error_of_a_row(seed: int) -> None:
    weight, unit, hessian = random_problem(seed)
    generator = torch.Generator().manual_seed(seed)
    scales = (1 + 0.01 * torch.randn(2, ROWS, COLUMNS // GROUP, generator=generator)).half().float()
    before = row_errors(weight, scaled(unit, scales), hessian)
    once = refit(weight, unit, hessian, scales)
    twice = refit(weight, unit, hessian, once)
    after, again = (row_errors(weight, scaled(unit, s), hessian) for s in (once, twice))
    assert (after <= before * (1 + 1e-4)).all()
    assert (again <= after * (1 + 1e-4)).all()


def test_refit_leaves_rows_alone_whose_codewords_are_all_zero() -> None:
    weight, unit, hessian = random_problem(0)
    unit[:, 0] = 0
    scales = initial_scales(weight)
    found = refit(weight, unit, hessian, scales)
    assert torch.equal(found[:, 0], scales[:, 0])
    assert found.isfinite().all()


def test_initial_scales_are_the_root_mean_square_in_fp16_and_never_zero() -> None:
    weight = torch.zeros(1, 2, 256)
    weight[0, 0, :128] = 3.0
    scales = initial_scales(weight)
    assert scales[0, 0, 0] == 3.0
    assert (scales > 0).all()
    assert torch.equal(scales, scales.half().float())


@FIXED
def test_sweeping_again_with_refit_scales_lowers_the_error_at_one_bit(seed: int) -> None:
    weight, _, hessian = random_problem(seed)
    generator = torch.Generator().manual_seed(seed)
    sample = torch.randn(1, 512, COLUMNS, generator=generator)
    vectors, counts = normalized_vectors(sample, torch.ones(1, COLUMNS), 8)
    codebook = fit_codebooks(vectors[0], counts[0], generator)["a"]
    factor = factorize(hessian, 8)
    first, second, third = (
        encode_matrices(weight, hessian, factor, codebook, refits=refits).errors for refits in (0, 1, 2)
    )
    assert second.sum() < 0.98 * first.sum()
    assert (third <= second).all(), "the best of every row is kept"
