"""Codebooks: symmetric, weighted, and as good as k-means without the symmetry."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from seeds import FIXED
from vqserve.encode.codebook import fit_codebooks, nearest, normalized_vectors, symmetric_kmeans
from vqserve.format.tiers import TIERS
from vqserve.reference.dequantize import Codebook


def sample(seed: int, count: int, d: int) -> tuple[Tensor, Tensor, torch.Generator]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, d, generator=generator), torch.rand(count, generator=generator) + 0.1, generator


def weighted_error(vectors: Tensor, counts: Tensor, codebook: Codebook) -> float:
    refinement = None if codebook.refinement is None else codebook.refinement.float()
    i, j = nearest(vectors, codebook.base.float(), refinement)
    words = codebook.base.float()[i]
    if j is not None and refinement is not None:
        words = words + refinement[j]
    return float(((vectors - words).square().sum(1) * counts).sum() / (vectors.square().sum(1) * counts).sum())


@pytest.mark.parametrize("d", [4, 8])
def test_every_codebook_consists_of_opposite_pairs(d: int, seed: int) -> None:
    for letter, codebook in fit_codebooks(*sample(seed, 4000, d)).items():
        assert codebook.tier is TIERS[letter]
        assert codebook.base.shape == (256, d)
        assert torch.equal(codebook.base[:128], -codebook.base[128:])
        if codebook.refinement is not None:
            assert codebook.refinement.shape == (16, d)
            assert torch.equal(codebook.refinement[:8], -codebook.refinement[8:])


def test_codewords_are_the_weighted_means_of_the_vectors_they_serve(seed: int) -> None:
    vectors, counts, generator = sample(seed, 3000, 2)
    half = symmetric_kmeans(vectors, counts, 4, generator)
    full = torch.cat([half, -half])
    distance = torch.cdist(torch.cat([vectors, -vectors]), full)
    rows, twice = distance.argmin(1), torch.cat([counts, counts])
    for row, word in enumerate(full):
        mine = rows == row
        mean = (torch.cat([vectors, -vectors])[mine] * twice[mine, None]).sum(0) / twice[mine].sum()
        torch.testing.assert_close(word, mean, rtol=0, atol=0.05)  # the last few steps of k-means are small, not zero


@FIXED
def test_heavier_vectors_draw_the_codewords(seed: int) -> None:
    vectors, _, generator = sample(seed, 20_000, 4)
    heavy = vectors[:, 0] > 0.5
    even = fit_codebooks(vectors, torch.ones(len(vectors)), generator)["c"]
    uneven = fit_codebooks(vectors, torch.where(heavy, 50.0, 1.0), generator)["c"]
    ones = torch.ones(int(heavy.sum()))
    assert weighted_error(vectors[heavy], ones, uneven) < 0.9 * weighted_error(vectors[heavy], ones, even)


@FIXED
def test_symmetry_costs_nothing_against_plain_kmeans(seed: int) -> None:
    vectors, counts, generator = sample(seed, 20_000, 4)
    both, twice = torch.cat([vectors, -vectors]), torch.cat([counts, counts])
    plain = both[torch.randperm(len(both), generator=generator)[:256]]
    for _ in range(25):
        rows = torch.cdist(both, plain).argmin(1)
        mass = torch.zeros(256).index_add_(0, rows, twice)
        total = torch.zeros(256, 4).index_add_(0, rows, both * twice[:, None])
        plain = torch.where(mass[:, None] > 0, total / mass[:, None], plain)
    found = fit_codebooks(vectors, counts, generator)["c"]
    free = Codebook(TIERS["c"], plain.half())
    assert weighted_error(vectors, counts, found) < 1.02 * weighted_error(vectors, counts, free)


@FIXED
@pytest.mark.parametrize(("d", "plain", "additive"), [(8, "a", "b"), (4, "c", "d")])
def test_alternating_fit_beats_a_refinement_put_on_top(d: int, plain: str, additive: str, seed: int) -> None:
    vectors, counts, generator = sample(seed, 20_000, d)
    found = fit_codebooks(vectors, counts, generator)
    base = found[plain].base.float()
    residual = vectors - base[nearest(vectors, base)[0]]
    half = symmetric_kmeans(residual, counts, 8, generator)
    stacked = Codebook(TIERS[additive], found[plain].base, torch.cat([half, -half]).half())
    alone, on_top, joint = (weighted_error(vectors, counts, c) for c in (found[plain], stacked, found[additive]))
    assert joint < 0.97 * on_top < on_top < alone


def test_vectors_are_normalized_per_row_and_group_and_weighted_by_their_columns() -> None:
    weight = torch.randn(2, 3, 256) * torch.tensor([[[1.0], [10.0], [100.0]]])
    importance = torch.ones(2, 256)
    importance[0, :8] = 5.0
    vectors, counts = normalized_vectors(weight, importance, 8)
    assert vectors.shape == (2, 3 * 32, 8)
    torch.testing.assert_close(
        vectors.unflatten(1, (3, 2, 16)).square().mean((3, 4)), torch.ones(2, 3, 2), rtol=1e-2, atol=0
    )
    torch.testing.assert_close(counts.mean(1), torch.ones(2))
    assert counts[0, 0] == pytest.approx(5 * float(counts[0, 1]))
