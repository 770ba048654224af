"""W -> U, S, V against LAPACK in float64: both paths, every shape, and the ways it can fail."""

from __future__ import annotations

import logging
import math

import pytest
import torch
from builders.llama import tiny_llama
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import get_peft_model

from sorsa_plugin import SORSAConfig, captured_energy, factorise
from sorsa_plugin.errors import DecompositionError, RankError, SORSAConfigError
from sorsa_plugin.linalg import svd as decomposition

U32 = 2.0**-24
SHAPES = {"square": (96, 96), "tall": (160, 64), "wide": (64, 160), "row": (1, 40), "column": (40, 1)}


def orthonormal(rows: int, columns: int, generator: torch.Generator) -> torch.Tensor:
    return torch.linalg.qr(torch.randn(rows, columns, generator=generator, dtype=torch.float64))[0]


def matrix_of(shape: tuple[int, int], spectrum: str, seed: int = 0) -> torch.Tensor:
    """fp32 matrix with a known kind of spectrum: "geometric" 0.8^k (a gap everywhere), "power" 1/k, "flat" 1."""
    k = torch.arange(min(shape), dtype=torch.float64)
    values = {"geometric": 0.8**k, "power": 1 / (k + 1), "flat": torch.ones_like(k)}[spectrum]
    generator = torch.Generator().manual_seed(seed)
    left, right = (orthonormal(side, min(shape), generator) for side in shape)
    return ((left * values) @ right.T).float()


def gap(P: torch.Tensor) -> float:
    P = P.double()
    return float((P.T @ P - torch.eye(P.shape[1], dtype=torch.float64)).norm())


@pytest.mark.parametrize("svd", ["exact", "randomized", "auto"])
@pytest.mark.parametrize("share", [0.0, 0.25, 1.0], ids=["rank-1", "quarter-rank", "full-rank"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_triplets_are_the_top_singular_triplets(shape, share, svd):
    W = matrix_of(shape, "geometric")
    rank = max(1, int(share * min(shape)))
    U, S, V = factorise(W, rank, svd=svd)
    assert (U.shape, S.shape, V.shape) == ((shape[0], rank), (rank,), (shape[1], rank))
    assert all(part.dtype == torch.float32 and part.is_contiguous() for part in (U, S, V))

    # Weyl: a backward error e moves a singular value by at most e. LAPACK's is a modest multiple of u ||W||_2, bounded
    # by the dimension; the randomized path multiplies 2 (power iterations) + 2 times more, each with `side` terms, but
    # only the last projection counts, because the others merely turn the basis.
    S64 = torch.linalg.svdvals(W.double())
    error = 2 * max(shape) * U32 * float(S64[0])
    assert (S.double() - S64[:rank]).abs().max() <= error
    assert torch.equal(S, S.sort(descending=True).values)

    limit = 1e-5 * rank**0.5  # what the package promises; the regularizer's floor rests on it
    assert gap(U) <= limit
    assert gap(V) <= limit

    # Each triplet satisfies W v = s u and W^T u = s v up to that backward error, sqrt(rank) of them in the norm.
    assert (W.double() @ V.double() - U.double() * S).norm() <= error * rank**0.5
    assert (W.double().T @ U.double() - V.double() * S).norm() <= error * rank**0.5


@pytest.mark.parametrize("svd", ["exact", "randomized"])
@pytest.mark.parametrize("shape", [(96, 96), (160, 64), (64, 160)], ids=["square", "tall", "wide"])
def test_the_subspaces_are_those_of_lapack_in_float64(shape, svd):
    W, rank = matrix_of(shape, "geometric"), 6
    U, _, V = factorise(W, rank, svd=svd)
    U64, S64, V64h = torch.linalg.svd(W.double(), full_matrices=False)
    # Davis-Kahan (Wedin): ||sin angle||_F <= sqrt(2 rank) e / (s_r - s_{r+1}), plus the factors' own rounding
    error = 2 * max(shape) * U32 * float(S64[0])
    limit = (2 * rank) ** 0.5 * error / float(S64[rank - 1] - S64[rank]) + 1e-5 * rank**0.5
    for found, expected in ((U, U64[:, :rank]), (V, V64h[:rank].T)):
        outside = found.double() - expected @ (expected.T @ found.double())
        assert outside.norm() <= limit


def best_energy(W: torch.Tensor, rank: int) -> float:
    S64 = torch.linalg.svdvals(W.double())
    return float(S64[:rank].square().sum() / S64.square().sum())


@pytest.mark.parametrize("rank", [4, 16, 60])
@pytest.mark.parametrize("target", [0.9, 0.99, 0.998])
@pytest.mark.parametrize("spectrum", ["geometric", "power", "flat", "gaussian"])
def test_the_randomized_path_captures_the_energy_asked_for(spectrum, target, rank):
    gaussian = torch.randn(320, 256, generator=torch.Generator().manual_seed(0))
    W = gaussian if spectrum == "gaussian" else matrix_of((320, 256), spectrum)
    share = captured_energy(W, factorise(W, rank, svd="randomized", energy=target)) / best_energy(W, rank)
    # the last gain stands for what is missing; where the spectrum has no gap, up to twice as much can be missing
    assert 1 - 2 * (1 - target) <= share <= 1 + 256 * U32


def test_more_energy_takes_a_larger_basis_and_an_easy_spectrum_a_small_one(monkeypatch):
    sizes = []
    triplets = decomposition.Projection.triplets

    def counting(self, *args):
        sizes.append(self.Q.shape[1])
        return triplets(self, *args)

    monkeypatch.setattr(decomposition.Projection, "triplets", counting)
    W = torch.randn(320, 256, generator=torch.Generator().manual_seed(0))
    for energy in (0.9, 0.99, 0.9999):
        factorise(W, 16, svd="randomized", energy=energy)
    factorise(matrix_of((320, 256), "geometric"), 16, svd="randomized", energy=0.99)
    assert sizes[0] < sizes[1] < sizes[2]
    assert sizes[3] < sizes[1]


@pytest.mark.parametrize("condition", [1.0, 1e2, 1e5, 1e12], ids=str)
def test_cholesky_qr_is_a_qr_decomposition_whatever_the_condition(condition):
    k = torch.arange(30, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    left, right = (orthonormal(side, 30, generator) for side in (200, 30))
    X = ((left * condition ** -(k / 29)) @ right.T).float()
    Q, R = decomposition.cholesky_qr(X)
    assert gap(Q) <= 1e-5 * 30**0.5
    assert torch.equal(R, R.triu())
    assert (Q.double() @ R.double() - X).norm() <= 2 * 200 * U32 * X.norm()  # two triangular solves or reflections


def test_a_basis_that_lost_orthonormality_is_rebuilt_by_householder_reflections(monkeypatch):
    W = matrix_of((96, 80), "geometric")
    monkeypatch.setattr(decomposition, "orthonormal", lambda X: X / X.norm(dim=0))  # parallel columns stay parallel
    U, S, V = factorise(W, 20, svd="randomized", energy=0.9)
    assert max(gap(U), gap(V)) <= 1e-5 * 20**0.5
    assert (S.double() - torch.linalg.svdvals(W.double())[:20]).abs().max() <= 0.1


@settings(max_examples=25, deadline=None)
@given(rows=st.integers(1, 30), columns=st.integers(1, 30), share=st.floats(0, 1), seed=st.integers(0, 2**16))
def test_factors_are_orthonormal_even_where_the_weight_has_a_lower_rank(rows, columns, share, seed):
    generator = torch.Generator().manual_seed(seed)
    inner = max(1, min(rows, columns) // 3)
    W = torch.randn(rows, inner, generator=generator) @ torch.randn(inner, columns, generator=generator)
    rank = max(1, int(share * min(rows, columns)))
    for svd in ("exact", "randomized"):
        U, S, V = factorise(W, rank, svd=svd)
        assert gap(U) <= 1e-5 * rank**0.5
        assert gap(V) <= 1e-5 * rank**0.5
        assert (S >= 0).all()


@pytest.mark.parametrize("svd", ["exact", "randomized"])
def test_a_zero_weight_has_orthonormal_factors_and_zero_values(svd):
    U, S, V = factorise(torch.zeros(12, 20), 4, svd=svd)
    assert torch.equal(S, torch.zeros(4))
    assert max(gap(U), gap(V)) <= 1e-5 * 2


@settings(max_examples=20, deadline=None)
@given(rank=st.integers(1, 12), seed=st.integers(0, 2**16), svd=st.sampled_from(["exact", "randomized"]))
def test_signs_are_fixed_by_the_largest_entry_of_each_column_of_u(rank, seed, svd):
    W = torch.randn(12, 17, generator=torch.Generator().manual_seed(seed))
    U, S, V = factorise(W, rank, svd=svd)
    peak = U.gather(0, U.abs().argmax(0, keepdim=True))
    assert (peak > 0).all()
    # what is fixed is the pair: U S V^T still is the best approximation, and not a column of it is negated
    assert ((W @ V) * U).sum(0).sub(S).abs().max() <= 4 * 17 * U32 * S[0]


def test_negating_the_weight_negates_v_alone():
    W = matrix_of((24, 24), "geometric")
    plus, minus = factorise(W, 5, svd="exact"), factorise(-W, 5, svd="exact")
    # the triplets' own accuracy: backward error over the gap 0.2 * 0.8^4 s_1, see above
    limit = 4 * 24 * U32 / (0.2 * 0.8**4)
    assert (plus.U - minus.U).abs().max() <= limit
    assert (plus.V + minus.V).abs().max() <= limit
    assert (plus.S - minus.S).abs().max() <= limit


def test_the_same_seed_gives_the_same_bits_and_another_seed_other_bits():
    W = torch.randn(80, 120, generator=torch.Generator().manual_seed(1))
    first, again, other = (factorise(W, 8, svd="randomized", seed=seed) for seed in (5, 5, 6))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first.U, other.U)
    exact = [factorise(W, 8, svd="exact", seed=seed) for seed in (5, 6)]
    assert all(torch.equal(a, b) for a, b in zip(*exact, strict=True))


@pytest.mark.parametrize("svd", ["exact", "randomized"])
def test_the_global_random_state_is_neither_read_nor_written(svd):
    W = torch.randn(40, 60, generator=torch.Generator().manual_seed(1))
    torch.manual_seed(123)
    before = torch.get_rng_state()
    first = factorise(W, 8, svd=svd)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(321)
    assert torch.equal(factorise(W, 8, svd=svd).U, first.U)


@pytest.mark.parametrize("svd", ["exact", "randomized"])
def test_get_peft_model_leaves_the_global_random_state_alone(svd):
    model = tiny_llama()
    torch.manual_seed(123)
    before = torch.get_rng_state()
    get_peft_model(model, SORSAConfig(r=4, target_modules="all-linear", svd=svd))
    assert torch.equal(torch.get_rng_state(), before)


def test_the_weight_is_not_written():
    W = torch.randn(20, 30)
    before = W.clone()
    for svd in ("exact", "randomized"):
        triplets = factorise(W, 20, svd=svd)
        triplets.U.zero_(), triplets.V.zero_()
        assert torch.equal(W, before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("svd", ["exact", "randomized"])
def test_other_dtypes_are_factorised_as_their_fp32_copy(dtype, svd):
    W = matrix_of((48, 32), "power").to(dtype)
    for found, expected in zip(factorise(W, 4, svd=svd), factorise(W.float(), 4, svd=svd), strict=True):
        assert found.dtype == torch.float32
        assert torch.equal(found, expected)


def test_a_finite_weight_whose_sum_overflows_is_factorised():
    triplets = factorise(torch.full((32, 32), 1e37), 1)
    # all entries are equal: sigma = 32 * 1e37, within the rounding of 32 additions
    assert torch.allclose(triplets.S, torch.tensor([3.2e38]), rtol=32 * torch.finfo(torch.float32).eps)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nan_or_infinity_is_an_error_that_names_the_layer(value, dtype):
    W = torch.ones(6, 8, dtype=dtype)
    W[2, 3] = value
    with pytest.raises(DecompositionError, match=r"weight of layers\.3\.up_proj holds NaN or infinity.*Check the base"):
        factorise(W, 2, name="layers.3.up_proj")


def test_a_broken_base_model_is_named_through_get_peft_model():
    model = tiny_llama()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = float("nan")
    with pytest.raises(DecompositionError, match=r"model\.layers\.1\.mlp\.up_proj"):
        get_peft_model(model, SORSAConfig(r=2, target_modules=["up_proj"]))


@pytest.mark.parametrize("shape", [(6, 9), (9, 6)])
def test_a_rank_beyond_the_smaller_side_is_an_error_with_the_limit(shape):
    factorise(torch.randn(shape), 6)
    with pytest.raises(RankError, match=r"rank of here is 7.*has only 6 singular triplets.*Lower r.*to at most 6"):
        factorise(torch.randn(shape), 7, name="here")
    assert issubclass(RankError, SORSAConfigError)


def test_auto_is_exact_for_small_or_nearly_full_rank_and_randomized_beyond(monkeypatch):
    W = torch.randn(64, 80, generator=torch.Generator().manual_seed(2))
    exact, randomized = factorise(W, 4, svd="exact"), factorise(W, 4, svd="randomized")
    assert not torch.equal(exact.U, randomized.U)
    assert torch.equal(factorise(W, 4).U, exact.U)
    monkeypatch.setattr(decomposition, "EXACT_LIMIT", 63)
    assert torch.equal(factorise(W, 4).U, randomized.U)
    assert torch.equal(factorise(W, 32).U, factorise(W, 32, svd="exact").U)
    assert torch.equal(factorise(W, 31).U, factorise(W, 31, svd="randomized").U)


def fail(times: int, monkeypatch: pytest.MonkeyPatch) -> list[torch.dtype]:
    """Make torch.linalg.svd diverge the first `times` times; the dtypes it was called with."""
    real, calls = torch.linalg.svd, []

    def svd(matrix, *args, **kwargs):
        calls.append(matrix.dtype)
        if len(calls) <= times:
            raise torch.linalg.LinAlgError("the algorithm failed to converge")
        return real(matrix, *args, **kwargs)

    monkeypatch.setattr(torch.linalg, "svd", svd)
    return calls


def test_an_accelerator_without_room_leaves_the_work_to_the_cpu(monkeypatch, caplog):
    weight = torch.randn(40, 30, generator=torch.Generator().manual_seed(0))
    expected, devices = factorise(weight, 4), []

    def exact(matrix: torch.Tensor, rank: int) -> decomposition.Triplets:
        devices.append(matrix.device.type)
        if len(devices) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return original(matrix, rank)

    original = decomposition._exact
    monkeypatch.setattr(decomposition, "_exact", exact)
    with caplog.at_level(logging.WARNING):
        found = factorise(weight, 4, name="model.layers.3.mlp.down_proj")
    assert devices == ["cpu", "cpu"]  # the first stands for an accelerator
    assert all(map(torch.equal, found, expected))
    assert "no room to decompose model.layers.3.mlp.down_proj" in caplog.text


@pytest.mark.parametrize("svd", ["exact", "randomized"])
def test_divergence_falls_back_to_float64_lapack_and_says_for_which_layer(svd, monkeypatch, caplog):
    W = matrix_of((20, 30), "geometric")
    expected = torch.linalg.svd(W.double(), full_matrices=False)
    calls = fail(1, monkeypatch)
    with caplog.at_level(logging.WARNING):
        U, S, V = factorise(W, 3, svd=svd, name="layers.0.q_proj")
    assert calls == [torch.float32, torch.float64]
    assert "layers.0.q_proj did not converge on cpu" in caplog.text
    assert {part.dtype for part in (U, S, V)} == {torch.float32}
    assert (S - expected.S[:3]).abs().max() <= U32  # rounded once from float64, s_1 = 1
    assert ((U * S) @ V.T - (expected.U[:, :3] * expected.S[:3]) @ expected.Vh[:3]).abs().max() <= 8 * U32


def test_exact_factors_that_are_not_orthonormal_are_computed_again_in_float64(monkeypatch, caplog):
    """As LAPACK's are not, but an accelerator's may be."""
    W, real = matrix_of((20, 30), "geometric"), torch.linalg.svd

    def svd(matrix, **options):
        U, S, Vh = real(matrix, **options)
        return (U * 1.001 if matrix.dtype == torch.float32 else U), S, Vh

    monkeypatch.setattr(torch.linalg, "svd", svd)
    with caplog.at_level(logging.WARNING):
        U = factorise(W, 3, svd="exact", name="layers.0.q_proj").U
    assert (U.T @ U - torch.eye(3)).norm() <= 9 * 20 * U32
    assert "layers.0.q_proj did not converge on cpu (U or V is not orthonormal)" in caplog.text


def test_divergence_everywhere_is_an_error_that_names_the_layer(monkeypatch):
    fail(2, monkeypatch)
    with pytest.raises(DecompositionError, match=r"layers\.0\.q_proj converged neither on cpu nor on the CPU"):
        factorise(torch.randn(20, 30), 3, name="layers.0.q_proj")


@settings(max_examples=20, deadline=None)
@given(rank=st.integers(1, 10), seed=st.integers(0, 2**16))
def test_captured_energy_is_the_share_of_the_squared_singular_values(rank, seed):
    W = torch.randn(10, 14, generator=torch.Generator().manual_seed(seed))
    S64 = torch.linalg.svdvals(W.double())
    expected = float(S64[:rank].square().sum() / S64.square().sum())
    # r + 2 sums of at most 140 fp32 terms, all of one sign
    assert abs(captured_energy(W, factorise(W, rank)) - expected) <= 4 * 140 * U32


def test_captured_energy_of_all_triplets_is_one_and_of_none_of_them_zero():
    W = matrix_of((10, 14), "geometric")
    full = factorise(W, 10)
    assert captured_energy(W, full) == pytest.approx(1.0, abs=4 * 140 * U32)
    assert captured_energy(torch.zeros(10, 14), full) == 1.0
    elsewhere = decomposition.Triplets(full.U[:, 5:], full.S[5:], full.V[:, :5])  # mismatched pairs span no energy
    assert captured_energy(W, elsewhere) <= 1e-10


@pytest.mark.parametrize("scale", [1e-38, 1e-25, 1e-10, 1e10, 1e36])
@pytest.mark.parametrize("svd", ["exact", "randomized"])
def test_weights_of_any_size_have_the_factors_and_the_energy_of_their_shape(svd: str, scale: float) -> None:
    """Powers of two: then nothing rounds, and the factors are the same bits."""
    unit = 2.0 ** round(math.log2(scale))
    W = matrix_of((300, 280), "power")
    plain, scaled = factorise(W, 20, svd=svd), factorise(W * unit, 20, svd=svd)
    vanishing = scale < 1e-30  # small entries of W are then below the smallest fp32 number of full precision
    for found, expected in zip(scaled, (plain.U, plain.S * unit, plain.V), strict=True):
        assert torch.equal(found, expected) or vanishing
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-3 * float(expected.abs().max()))
    best = best_energy(W, 20)
    assert captured_energy(W * unit, scaled) == pytest.approx(captured_energy(W, plain), rel=1e-4)
    assert 0.99 * best <= captured_energy(W * unit, scaled) <= best * (1 + 1e-4)


@pytest.mark.parametrize("svd", ["exact", "randomized"])
def test_singular_values_above_fp32_are_an_error(svd: str) -> None:
    with pytest.raises(DecompositionError, match=r"largest singular value .* layers\.0\.q_proj is 1\.6e\+39"):
        factorise(torch.full((16, 16), 1e38), 2, svd=svd, name="layers.0.q_proj")
