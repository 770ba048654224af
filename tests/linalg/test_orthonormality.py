"""The gap of a factor, its gradient above and below the floor of the initialisation, and its second derivative."""

from __future__ import annotations

import pytest
import torch

from sorsa_plugin.linalg.orthonormality import gap

EPS = 1e-5
"""Per root of the rank: the orthonormality that a new adapter has."""


def nearly_orthonormal(rank: int, size: float) -> torch.Tensor:
    """Q (I + size/2 D) in float64, for D of unit norm: its gap is `size` up to size^2."""
    generator = torch.Generator().manual_seed(rank)
    Q = torch.linalg.qr(torch.randn(40, rank, generator=generator, dtype=torch.float64))[0]
    D = torch.randn(rank, rank, generator=generator, dtype=torch.float64)
    D = (D + D.T) / (D + D.T).norm()
    return Q @ (torch.eye(rank, dtype=torch.float64) + size / 2 * D)


@pytest.mark.parametrize("rank", [1, 4, 16])
@pytest.mark.parametrize("size", [1e-7, 1e-6, 1e-2, 0.5], ids=str)
def test_the_gradient_is_the_papers_and_fades_below_the_floor(size: float, rank: int) -> None:
    P = nearly_orthonormal(rank, size).requires_grad_()
    found = gap(P)
    (gradient,) = torch.autograd.grad(found, P)
    E = P.detach().T @ P.detach() - torch.eye(rank, dtype=torch.float64)
    assert float(found) == pytest.approx(float(E.norm()), rel=1e-9)
    expected = 2 / max(float(E.norm()), EPS * rank**0.5) * P.detach() @ E
    torch.testing.assert_close(gradient, expected, rtol=1e-9, atol=1e-12)
    assert float(gradient.norm()) <= 2.0 * min(1.0, size / (EPS * rank**0.5)) * 1.3


@pytest.mark.parametrize("shape", [(6, 3), (2, 6, 3)], ids=str)
def test_second_derivatives_agree_with_finite_differences_in_float64(shape: tuple[int, ...]) -> None:
    P = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    assert torch.autograd.gradgradcheck(gap, (P,))


def test_the_second_derivative_at_orthonormal_factors_is_finite() -> None:
    P = torch.eye(5, 3, dtype=torch.float64).requires_grad_()
    (gradient,) = torch.autograd.grad(gap(P), [P], create_graph=True)
    gradient.sum().backward()
    assert bool(P.grad.isfinite().all())
