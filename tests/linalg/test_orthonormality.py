"""The gap's closed form is differentiable once more. Its values and its gradient: tests/regularizer/test_gaps.py."""

from __future__ import annotations

import pytest
import torch

from sorsa_plugin.linalg.orthonormality import gap


@pytest.mark.parametrize("shape", [(6, 3), (2, 6, 3)], ids=str)
def test_second_derivatives_agree_with_finite_differences_in_float64(shape: tuple[int, ...]) -> None:
    P = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    assert torch.autograd.gradgradcheck(gap, (P,))


def test_the_second_derivative_at_orthonormal_factors_is_finite() -> None:
    P = torch.eye(5, 3, dtype=torch.float64).requires_grad_()
    (gradient,) = torch.autograd.grad(gap(P), [P], create_graph=True)
    gradient.sum().backward()
    assert bool(P.grad.isfinite().all())
