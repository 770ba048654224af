"""y + x (U S V^T)^T: the part that the base output of a folded layer lacks; knows no layer or adapter.

One autograd function: six products of r columns, forward and backward together.
"""

from __future__ import annotations

from typing import Any

import torch

from .offset_form import (
    Parts,
    add_product,
    columns,
    input_gradient,
    left_to_autograd,
    own_tensor,
    product_of_rows,
    twice_differentiable,
)
from .precision import without_autocast


def add_initial(y: torch.Tensor, x: torch.Tensor, parts: Parts) -> torch.Tensor:
    """y + U0 S0 V0^T x (... x out) for y (... x out), x (... x in), in the dtype of `y`. Consumes `y`.

    Bit-equal to what `add_triplets` returns at init.
    """
    zero = parts.S0.new_zeros(())
    return add_triplets(y, x, parts._replace(dU=zero, dS=zero, dV=zero))


def add_triplets(y: torch.Tensor, x: torch.Tensor, parts: Parts, weight: torch.Tensor | None = None) -> torch.Tensor:
    """y + ((x V) * S) U^T (... x out) in the dtype of `y`, which is consumed; arguments as
    `offset_form.add_low_rank`."""
    if left_to_autograd():
        return y + _written_out(x.to(y.dtype), parts)
    return _AddTriplets.apply(own_tensor(y), x, weight, *parts)


def _written_out(x: torch.Tensor, parts: Parts) -> torch.Tensor:
    """((x V) * S) U^T (... x out) for x (... x in), in the dtype of `x`, in operators that autograd knows."""
    U, S, V = (part.to(x.dtype) for part in parts.current())
    return ((x @ V) * S) @ U.mT


class _AddTriplets(torch.autograd.Function):
    """With C = x V, G = (g U) * S and K = g^T C: grad x = G V^T, dU = K * S, dS = diag(U^T K), dV = x^T G."""

    @staticmethod
    def forward(
        ctx: Any, y: torch.Tensor, x: torch.Tensor, weight: torch.Tensor | None, *tensors: torch.Tensor
    ) -> torch.Tensor:
        with without_autocast(y.device.type):
            U, S, V = (part.to(y.dtype) for part in Parts(*tensors).current())
            C = columns(x.to(y.dtype), V)
            add_product(y, C * S, U)
        ctx.mark_dirty(y)
        ctx.save_for_backward(x, C, weight, *tensors)
        return y

    @staticmethod
    def backward(ctx: Any, g: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        if torch.is_grad_enabled():  # create_graph=True
            return twice_differentiable(ctx, g, _written_out)
        x, C, weight, *tensors = ctx.saved_tensors
        grad_x = grad_U = grad_S = grad_V = None
        with without_autocast(g.device.type):
            U, S, V = Parts(*tensors).current()
            G = columns(g, U.to(g.dtype)) * S.to(g.dtype)
            if ctx.needs_input_grad[1]:
                grad_x = input_gradient(g, G, V.to(g.dtype), weight).to(x.dtype)
            if any(ctx.needs_input_grad[3:6]):
                K = product_of_rows(g, C).to(S.dtype)
                grad_U = (K * S).to(tensors[0].dtype)
                grad_S = (K * U).sum(0).to(tensors[1].dtype)
                grad_V = product_of_rows(x.to(g.dtype), G).to(tensors[2].dtype)
        return g, grad_x, None, grad_U, grad_S, grad_V, None, None, None
