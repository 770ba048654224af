"""The orthonormality gap of a factor, and its gradient in closed form; knows no layer.

    gap(P) = ||E||_F,  E = P^T P - I                                       (arXiv 2409.00055, section 3)
    dgap/dP = 2/n P E,  n = max(||E||_F, eps),  eps = 1e-5 sqrt(r)         (the published `calc_ortho`)

eps is the orthonormality that the initialisation promises. It is our addition: without it the gradient at init is
rounding noise at full strength, which is what the published code adds.
"""

from __future__ import annotations

from typing import Any

import torch

from .precision import full_precision


def floor(rank: int) -> float:
    """eps = 1e-5 sqrt(r): the gap below which a factor counts as orthonormal."""
    return 1e-5 * rank**0.5


def gram_minus_identity(P: torch.Tensor) -> torch.Tensor:
    """E = P^T P - I (r x r) of a factor P (rows x r), or (E x r x r) of a stack (E x rows x r), in the dtype of P."""
    return minus_identity(P.mT @ P)


def minus_identity(gram: torch.Tensor) -> torch.Tensor:
    """G - I for G (r x r) or a stack (E x r x r), in place."""
    gram.diagonal(dim1=-2, dim2=-1).sub_(1.0)
    return gram


def gap(P: torch.Tensor) -> torch.Tensor:
    """||P^T P - I||_F of a factor P (rows x r), a scalar; or of each factor in a stack (E x rows x r), shape (E).

    Differentiable by the closed form above, which is smooth at orthonormal factors. Products are fp32 whatever
    autocast and TF32 say.
    """
    return _Gap.apply(P)


class _Gap(torch.autograd.Function):
    @staticmethod
    @full_precision()
    def forward(ctx: Any, P: torch.Tensor) -> torch.Tensor:
        E = gram_minus_identity(P)
        norm = torch.linalg.vector_norm(E, dim=(-2, -1))
        ctx.save_for_backward(P, E, norm)
        return norm

    @staticmethod
    @full_precision()
    def backward(ctx: Any, upstream: torch.Tensor) -> torch.Tensor:
        P, E, norm = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph=True: E and its norm as functions of P
            E = gram_minus_identity(P)
            norm = torch.linalg.vector_norm(E, dim=(-2, -1))
        return 2.0 * (P @ (E * (upstream / norm.clamp_min(floor(P.shape[-1])))[..., None, None]))
