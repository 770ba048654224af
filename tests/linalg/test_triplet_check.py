"""Factors are known for a weight's own triplets, to the rounding that they and the weight went through."""

from __future__ import annotations

import pytest
import torch

from sorsa_plugin.errors import IncompleteAdapterError
from sorsa_plugin.linalg.svd import Triplets, factorise
from sorsa_plugin.linalg.triplet_check import check_orthonormal, check_triplets

FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16


def weight(out: int, inner: int, seed: int = 0) -> torch.Tensor:
    """Gaussian, and every second one with rows of different norms: the triplets are then of few rows."""
    generator = torch.Generator().manual_seed(seed)
    W = torch.randn(out, inner, generator=generator)
    return W * torch.randn(out, 1, generator=generator).exp() if seed % 2 else W


def check(triplets: Triplets, W: torch.Tensor, then: str = "float32", now: str = "float32") -> None:
    check_orthonormal(triplets.U, triplets.V, "here")
    check_triplets(*triplets, W, then, now, "here")


def cast(triplets: Triplets, dtype: torch.dtype) -> Triplets:
    return Triplets(*(part.to(dtype).float() for part in triplets))


@pytest.mark.parametrize("file", [FP32, FP16, BF16], ids=str)
@pytest.mark.parametrize("now", [FP32, FP16, BF16], ids=str)
@pytest.mark.parametrize("svd", ["exact", "randomized"])
def test_every_factorisation_passes_at_every_rounding(svd, now, file):
    for seed, (out, inner, rank) in enumerate(
        [(32, 32, 4), (32, 32, 32), (400, 300, 8), (300, 400, 64), (8, 64, 1)] * 2
    ):
        W = weight(out, inner, seed)
        triplets = factorise(W, rank, svd=svd, energy=0.5)  # far from converged, for a randomised one
        check(cast(triplets, file), W.to(now), now=str(now).removeprefix("torch."))


@pytest.mark.parametrize("file", [FP32, FP16, BF16], ids=str)
@pytest.mark.parametrize("now", [FP32, BF16], ids=str)
def test_factors_of_another_weight_are_refused_at_every_rounding(now, file):
    for seed in range(10):
        triplets = cast(factorise(weight(64, 48, seed + 1), 8), file)
        with pytest.raises(IncompleteAdapterError, match="no singular triplets"):
            check(triplets, weight(64, 48, seed).to(now), now=str(now).removeprefix("torch."))


def test_a_quantised_base_shows_what_its_adapter_started_from_and_so_does_its_full_weight():
    for seed in range(10):
        W = weight(64, 48, seed)
        step = W.abs().amax(1, keepdim=True) / 7
        coarse = (W / step).round() * step
        triplets = factorise(coarse, 8)
        check(triplets, coarse, "4bit-nf4-64", "4bit-nf4-64")
        check(triplets, W, "4bit-nf4-64", "float32")
        with pytest.raises(IncompleteAdapterError):
            check(triplets._replace(S=-triplets.S), W, "4bit-nf4-64", "float32")


def test_of_a_stack_the_matrix_is_named():
    W = torch.stack([weight(16, 12, seed) for seed in range(3)])
    parts = [factorise(one, 4) for one in W]
    check_triplets(*(torch.stack(part) for part in zip(*parts, strict=True)), W, "float32", "float32", "experts")
    parts[2] = parts[1]
    with pytest.raises(IncompleteAdapterError, match=r"experts\[2\]"):
        check_triplets(*(torch.stack(part) for part in zip(*parts, strict=True)), W, "float32", "float32", "experts")


def test_a_weight_of_zeros_has_triplets():
    check(factorise(torch.zeros(20, 12), 3), torch.zeros(20, 12))


def test_nan_is_no_triplet():
    W = weight(20, 12)
    triplets = factorise(W, 3)
    with pytest.raises(IncompleteAdapterError, match="U0 of here is not orthonormal"):
        check(triplets._replace(U=triplets.U * float("nan")), W)
