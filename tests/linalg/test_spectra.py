"""dSigma and dD are the paper's, and do not depend on what a decomposition leaves open."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sorsa_plugin.errors import DecompositionError, RankError
from sorsa_plugin.linalg.spectra import (
    Spectrum,
    condition_number,
    decompose,
    degenerate_runs,
    delta_direction,
    delta_sigma,
    product_condition,
)

CLOSE = 1e-9
"""Vectors of singular values with a relative gap g err by about 1e-16 / g; the gaps below are above 1e-5."""


def matrix(rows: int, columns: int, seed: int) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def orthogonal(size: int, seed: int) -> torch.Tensor:
    return torch.linalg.qr(matrix(size, size, seed))[0]


def with_values(values: list[float], rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    count = len(values)
    return (orthogonal(rows, seed)[:, :count] * torch.tensor(values).double()) @ orthogonal(columns, seed + 1)[
        :, :count
    ].T


def reference(before: torch.Tensor, after: torch.Tensor) -> tuple[float, float]:
    """The paper's formulas as they stand, in numpy."""
    U0, S0, V0 = np.linalg.svd(before.numpy(), full_matrices=False)
    Ut, St, Vt = np.linalg.svd(after.numpy(), full_matrices=False)
    cosines = [abs(Ut[:, i] @ U0[:, i]) + abs(Vt[i] @ V0[i]) for i in range(len(S0))]
    return float(np.mean(np.abs(St - S0))), float(1 - np.mean(cosines) / 2)


shapes = st.sampled_from([(12, 12), (16, 9), (7, 15), (1, 6), (5, 1)])
seeds = st.integers(0, 10_000)


@settings(max_examples=40, deadline=None)
@given(shapes, seeds, st.sampled_from([1e-4, 0.1, 3.0]))
def test_it_is_the_papers_formula(shape, seed, scale):
    before = matrix(*shape, seed)
    after = before + scale * matrix(*shape, seed + 1)
    old, new = decompose(before), decompose(after)
    sigma, direction = reference(before, after)
    assert delta_sigma(old, new) == pytest.approx(sigma, abs=CLOSE)
    found = delta_direction(old, new, degenerate=0)
    assert found == pytest.approx(direction, abs=CLOSE)
    assert 0 <= found <= 1
    # Mirsky: the singular values move by no more than the matrix, in the Frobenius norm
    assert delta_sigma(old, new) <= float((after - before).norm()) / math.sqrt(len(old.S)) + CLOSE


@settings(max_examples=25, deadline=None)
@given(shapes, seeds)
def test_it_does_not_depend_on_orthogonal_changes_of_coordinates(shape, seed):
    before, change = matrix(*shape, seed), 0.2 * matrix(*shape, seed + 1)
    P, Q = orthogonal(shape[0], seed + 2), orthogonal(shape[1], seed + 3)
    old, new = decompose(before), decompose(before + change)
    turned_old, turned_new = decompose(P @ before @ Q), decompose(P @ (before + change) @ Q)
    assert delta_direction(turned_old, turned_new) == pytest.approx(delta_direction(old, new), abs=CLOSE)
    assert delta_sigma(turned_old, turned_new) == pytest.approx(delta_sigma(old, new), abs=CLOSE)
    flipped = delta_direction(decompose(before.T), decompose((before + change).T))
    assert flipped == pytest.approx(delta_direction(old, new), abs=CLOSE)


@settings(max_examples=25, deadline=None)
@given(seeds, st.lists(st.booleans(), min_size=8, max_size=8))
def test_signs_do_not_count(seed, flips):
    old, new = decompose(matrix(12, 8, seed)), decompose(matrix(12, 8, seed) + 0.1 * matrix(12, 8, seed + 1))
    signs = torch.tensor([-1.0 if flip else 1.0 for flip in flips], dtype=torch.float64)
    other = Spectrum(new.U * signs, new.S, new.V * signs)
    assert delta_direction(old, other) == pytest.approx(delta_direction(old, new), abs=CLOSE)
    assert delta_direction(old, Spectrum(old.U * signs, old.S, old.V * signs)) == pytest.approx(0, abs=CLOSE)


def rotated(spectrum: Spectrum, run: slice, seed: int) -> Spectrum:
    """Another decomposition of the same matrix, where the singular values of the run are equal."""
    U, V = spectrum.U.clone(), spectrum.V.clone()
    turn = orthogonal(run.stop - run.start, seed)
    U[:, run], V[:, run] = U[:, run] @ turn, V[:, run] @ turn
    return Spectrum(U, spectrum.S, V)


@settings(max_examples=25, deadline=None)
@given(seeds)
def test_rotations_among_equal_singular_values_do_not_count(seed):
    before = with_values([5, 4, 4, 4, 2, 1], 9, 7, seed)
    old = decompose(before)
    for turn in range(3):
        other = rotated(old, slice(1, 4), seed + turn)
        torch.testing.assert_close((other.U * other.S) @ other.V.T, before, atol=1e-12, rtol=0)
        assert delta_direction(old, other) == pytest.approx(0, abs=CLOSE)
        new = decompose(before + 0.1 * matrix(9, 7, seed + 5))
        assert delta_direction(other, new) == pytest.approx(delta_direction(old, new), abs=CLOSE)
        assert delta_direction(new, other) == pytest.approx(delta_direction(new, old), abs=CLOSE)


def test_a_null_space_does_not_count():
    before = with_values([3, 2, 1, 0, 0, 0], 8, 6)
    old = decompose(before)
    assert delta_direction(old, rotated(old, slice(3, 6), 1)) == pytest.approx(0, abs=CLOSE)
    assert condition_number(old.S) == math.inf


@pytest.mark.parametrize("angle", [0.0, 0.3, 1.2, math.pi / 2])
def test_a_rotation_of_two_distinct_vectors_counts_as_its_cosine(angle):
    old = decompose(with_values([5, 4, 3, 2, 1], 6, 5))
    U = old.U.clone()
    c, s = math.cos(angle), math.sin(angle)
    U[:, 1], U[:, 2] = c * old.U[:, 1] + s * old.U[:, 2], c * old.U[:, 2] - s * old.U[:, 1]
    new = decompose((U * old.S) @ old.V.T)
    assert delta_direction(old, new) == pytest.approx((1 - c) / 5, abs=CLOSE)
    assert delta_sigma(old, new) == pytest.approx(0, abs=CLOSE)


def test_triplets_that_change_places_count_unless_they_are_close():
    values = torch.tensor([5, 4, 3, 2, 1]).double()
    old = decompose(with_values(values.tolist(), 6, 5))
    swapped = decompose((old.U * torch.tensor([5, 3.0, 4, 2, 1]).double()) @ old.V.T)
    assert delta_direction(old, swapped) == pytest.approx(2 / 5, abs=CLOSE)
    assert delta_direction(old, swapped, degenerate=0.25) == pytest.approx(0, abs=CLOSE)  # gaps of 1 in 5
    assert [(run.start, run.stop) for run in degenerate_runs(old, swapped, 0.25)] == [(0, 5)]
    assert len(degenerate_runs(old, swapped)) == 5


@pytest.mark.parametrize("shape", [(40, 24), (24, 40), (30, 30)])
def test_the_first_triplets_are_those_of_a_full_decomposition(shape):
    before = matrix(*shape, 1)
    after = before + 0.1 * matrix(*shape, 2)
    full, part = decompose(before), decompose(before, top=6)
    assert part.U.shape == (shape[0], 6)
    assert part.V.shape == (shape[1], 6)
    assert torch.allclose(part.S, full.S, rtol=1e-9)
    assert delta_direction(Spectrum(full.U[:, :6], full.S, full.V[:, :6]), part) == pytest.approx(0, abs=CLOSE)
    new = decompose(after, top=6)
    S0, St = (np.linalg.svd(weight.numpy(), compute_uv=False)[:6] for weight in (before, after))
    assert delta_sigma(part, new) == pytest.approx(np.abs(St - S0).mean(), abs=CLOSE)
    assert decompose(before, top=1000).U.shape[1] == min(shape)


def test_small_singular_values_are_not_lost_in_the_gram_matrix():
    weight = with_values([1.0, 0.5, 1e-9], 8, 5)[:, :3]
    assert decompose(with_values([1.0, 0.5, 1e-9], 8, 3), top=2).S[2] == pytest.approx(1e-9, rel=1e-5)
    assert decompose(weight, top=1).S[0] == pytest.approx(float(torch.linalg.svdvals(weight)[0]))


def test_equal_values_that_top_cuts_in_two_are_left_out():
    old = decompose(with_values([5, 4, 3, 3, 3, 1], 9, 6))
    other = rotated(old, slice(2, 5), 7)
    first = [Spectrum(spectrum.U[:, :3], spectrum.S, spectrum.V[:, :3]) for spectrum in (old, other)]
    assert delta_direction(*first) == pytest.approx(0, abs=CLOSE)


@settings(max_examples=20, deadline=None)
@given(shapes, seeds)
def test_condition_numbers_are_numpys(shape, seed):
    weight = matrix(*shape, seed)
    assert condition_number(decompose(weight).S) == pytest.approx(np.linalg.cond(weight.numpy()), rel=1e-6)


def test_the_condition_of_a_product_is_that_on_its_rank():
    P, Q = matrix(12, 3, 0), matrix(9, 3, 1)
    values = np.linalg.svd((P @ Q.T).numpy(), compute_uv=False)
    assert product_condition(P, Q) == pytest.approx(values[0] / values[2], rel=1e-9)
    assert product_condition(torch.zeros(12, 3), Q) is None
    P[:, 2] = P[:, 0]
    assert product_condition(P, Q) is None


def test_what_has_no_singular_values_is_a_sentence():
    weight = matrix(4, 3, 0)
    with pytest.raises(RankError, match="top is 0; expected an integer >= 1"):
        decompose(weight, top=0)
    weight[1, 1] = math.nan
    with pytest.raises(DecompositionError, match="q_proj holds NaN or infinity"):
        decompose(weight, name="q_proj")
