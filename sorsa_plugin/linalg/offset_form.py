"""y + x (U S V^T - U0 S0 V0^T)^T: the change that an adapter makes to a layer's output; knows no layer or adapter.

With L = [dU * S, U0] (out x 2r) and R = [V, V0 * dS + dV * S] (in x 2r) the change is (x R) L^T. For an output gradient
g, with C1 = x V (the first r columns of x R), D = g L, E = [D1 + D2 * dS, D1 + D2 * S] and K = g^T C1:

    grad x = E [V0, dV]^T      grad dU = K * S      grad dS = diag(U^T K)      grad dV = x^T E2

because E2 = g U S and E [V0, dV]^T = D R^T. That is ten products of r columns, forward and backward together. No out x
in matrix is formed. Backward keeps only x and x V.

Where y is x W^T + b with a frozen W, y needs no graph of its own. Given W, the function computes the whole gradient of
x, g W + E [V0, dV]^T, in one tensor. Autograd would compute two and add them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch

from .precision import without_autocast

FEW_COLUMNS = 32
"""Below this rank, weight gradients are computed transposed. Libraries are up to three times as fast at few rows as at
few columns, and the transposed copy into `.grad` is small."""

FEWEST_COLUMNS = 8
"""Up to this number of columns, products with the tokens are computed transposed as well. That takes 0.5 to 0.8 of the
time; from 16 columns on it would take more."""

Pair = tuple[torch.Tensor, torch.Tensor]


class Parts(NamedTuple):
    """Offsets and initial factors of one adapter: dU, U0 (out x r), dS, S0 (r), dV, V0 (in x r)."""

    dU: torch.Tensor
    dS: torch.Tensor
    dV: torch.Tensor
    U0: torch.Tensor
    S0: torch.Tensor
    V0: torch.Tensor

    def current(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """U (out x r), S (r), V (in x r), in the factors' dtype."""
        return self.U0 + self.dU, self.S0 + self.dS, self.V0 + self.dV

    def pair(self) -> Pair:
        """L (out x 2r) and R (in x 2r), or stacks of them, in the factors' dtype (fp32); cast them to multiply."""
        dS = self.dS.unsqueeze(-2)  # for stacks of matrices
        S = self.S0.unsqueeze(-2) + dS
        R = torch.cat((self.V0 + self.dV, torch.addcmul(self.V0 * dS, self.dV, S)), dim=-1)
        return self.left(S), R

    def left(self, S: torch.Tensor) -> torch.Tensor:
        """L = [dU * S, U0] (out x 2r), for S (1 x r)."""
        return torch.cat((self.dU * S, self.U0), dim=-1)


def change_norm(L: torch.Tensor, R: torch.Tensor) -> float:
    """||L R^T||_F in float64, from the two Gram matrices; L (out x k) and R (in x k), or stacks of them."""
    L, R = L.double(), R.double()
    return float(((L.mT @ L) * (R.mT @ R)).sum().clamp_min(0.0).sqrt())


def add_low_rank(y: torch.Tensor, x: torch.Tensor, parts: Parts, weight: torch.Tensor | None = None) -> torch.Tensor:
    """Add the change to a base output, in the dtype of `y`. Consumes `y`.

    Args:
        y: base output (... x out), fresh from the base layer: this function writes to it.
        x: input (... x in) of any floating dtype. Products are computed in the dtype of `y`.
        parts: the adapter's tensors, fp32.
        weight: W (out x in) in the dtype of `y`, if `y` is x W^T + b computed without a graph (`torch.no_grad`).

    Returns:
        y + (x R) L^T (... x out). Differentiable with respect to y, x and the offsets. If W is given, the gradient of
            x includes that of the base product. A graph of the gradient (`create_graph=True`) costs what the plain
            formulas cost.
    """
    if left_to_autograd():
        return y + written_out(x.to(y.dtype), parts)
    if torch.is_grad_enabled():
        return _AddLowRank.apply(own_tensor(y), x, weight, *parts)
    with without_autocast(y.device.type):
        L, R = _held_pair(parts, y.dtype)
        return add_product(y, columns(x.to(y.dtype), R), L)


def written_out(x: torch.Tensor, parts: Parts) -> torch.Tensor:
    """(x R) L^T (... x out) for x (... x in), in the dtype of `x`, in operators that autograd knows."""
    L, R = parts.pair()
    return (x @ R.to(x.dtype)) @ L.to(x.dtype).mT


def twice_differentiable(
    ctx: Any, g: torch.Tensor, change: Callable[[torch.Tensor, Parts], torch.Tensor]
) -> tuple[torch.Tensor | None, ...]:
    """The gradient of y + change(x, parts), with a graph of its own: for backward with `create_graph=True`.

    Args:
        ctx: of a function of (y, x, weight, *parts) that saved x first, then weight and parts from the third on.
        g: output gradient (... x out).
        change: the formula that the function computes, in operators that autograd knows.

    Returns:
        What the function's backward returns. Each gradient is differentiable with respect to g, x and the parts.
    """
    x, _, weight, *tensors = ctx.saved_tensors
    wanted = [tensor if needed else None for tensor, needed in zip((x, *tensors), _needs(ctx), strict=True)]
    inputs = [tensor for tensor in wanted if tensor is not None]
    with without_autocast(g.device.type):
        output = change(x.to(g.dtype), Parts(*tensors))
        found = iter(torch.autograd.grad(output, inputs, g, create_graph=True) if inputs else ())
        grad_x, *grads = [None if tensor is None else next(found) for tensor in wanted]
        if grad_x is not None and weight is not None:
            grad_x = grad_x + (g @ weight).to(x.dtype)
    return g, grad_x, None, *grads


def _needs(ctx: Any) -> tuple[bool, ...]:
    return ctx.needs_input_grad[1], *ctx.needs_input_grad[3:]


def left_to_autograd() -> bool:
    """Whether to write the formulas out and leave the gradient to autograd.

    True under a compiler, which fuses plain formulas better than a custom function. Also true under torch.func's
    transforms (per-sample gradients) and torch.jit.trace, which accept no function that writes in place.
    """
    return torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active() or torch._C._is_tracing()


def add_product(y: torch.Tensor, C: torch.Tensor, L: torch.Tensor) -> torch.Tensor:
    """y += C L^T in place, for y (... x out), C (... x n), L (out x n): one pass over y if it is contiguous."""
    if y.is_contiguous():
        y.view(-1, y.shape[-1]).addmm_(rows(C), L.mT)
    else:
        y.add_(C @ L.mT)
    return y


def own_tensor(y: torch.Tensor) -> torch.Tensor:
    """y as a tensor (same shape) that an autograd function may write to: a copy if y is a view.

    A biased linear on three dimensions returns a view. Writing to it costs five passes over its gradient in backward;
    copying it costs one.
    """
    return y.clone() if y._is_view() else y


def rows(tensor: torch.Tensor) -> torch.Tensor:
    """(... x n) as a matrix (tokens x n)."""
    return tensor.reshape(-1, tensor.shape[-1])


def input_gradient(g: torch.Tensor, D: torch.Tensor, R: torch.Tensor, weight: torch.Tensor | None) -> torch.Tensor:
    """D R^T, or g W + D R^T if W (out x in) is given; for g (... x out), D (... x n), R (in x n).

    The result is never a view of another tensor, because autograd may add other gradients to it in place.
    """
    return D @ R.mT if weight is None else add_product(g @ weight, D, R)


def columns(x: torch.Tensor, narrow: torch.Tensor) -> torch.Tensor:
    """x narrow (... x r), for x (... x d) and narrow (d x r)."""
    if narrow.shape[1] > FEWEST_COLUMNS:
        return x @ narrow
    return (narrow.mT @ rows(x).mT).mT.reshape(*x.shape[:-1], narrow.shape[1])


def product_of_rows(wide: torch.Tensor, narrow: torch.Tensor) -> torch.Tensor:
    """wide^T narrow (d x r), for wide (... x d) and narrow (... x r)."""
    wide, narrow = rows(wide), rows(narrow)
    return (narrow.mT @ wide).mT if narrow.shape[1] < FEW_COLUMNS else wide.mT @ narrow


class _AddLowRank(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, y: torch.Tensor, x: torch.Tensor, weight: torch.Tensor | None, *tensors: torch.Tensor
    ) -> torch.Tensor:
        parts = Parts(*tensors)
        with without_autocast(y.device.type):
            L, R = _formed(parts, y.dtype)
            C = columns(x.to(y.dtype), R)
            add_product(y, C, L)
        ctx.mark_dirty(y)
        C1 = C[..., : parts.dS.shape[0]].contiguous()  # not a view: frees half of C
        ctx.save_for_backward(x, C1, weight, *parts)
        return y

    @staticmethod
    def backward(ctx: Any, g: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        if torch.is_grad_enabled():  # create_graph=True
            return twice_differentiable(ctx, g, written_out)
        x, C1, weight, *tensors = ctx.saved_tensors
        parts = Parts(*tensors)
        rank = parts.dS.shape[0]
        grads: dict[str, torch.Tensor] = {}
        with without_autocast(g.device.type):
            S = parts.S0 + parts.dS
            E = columns(g, parts.left(S).to(g.dtype))
            E1, E2 = E[..., :rank], E[..., rank:]  # D1 and D2 until they are mixed, in place
            E1.addcmul_(E2, parts.dS.to(g.dtype))
            torch.addcmul(E1, E2, parts.S0.to(g.dtype), out=E2)
            if ctx.needs_input_grad[1]:
                V0_dV = torch.cat((parts.V0, parts.dV), dim=-1).to(g.dtype)
                grads["x"] = input_gradient(g, E, V0_dV, weight).to(x.dtype)
            if any(ctx.needs_input_grad[3:6]):
                K = product_of_rows(g, C1).to(S.dtype)
                grads["dU"] = (K * S).to(parts.dU.dtype)
                grads["dS"] = (K * (parts.U0 + parts.dU)).sum(0).to(parts.dS.dtype)
                grads["dV"] = product_of_rows(x.to(g.dtype), E2).to(parts.dV.dtype)
        return g, grads.get("x"), None, grads.get("dU"), grads.get("dS"), grads.get("dV"), None, None, None


_held: ContextVar[dict[Any, tuple[Any, Pair, Parts]] | None] = ContextVar("sorsa_held_pairs", default=None)


@contextmanager
def holding_pairs() -> Iterator[None]:
    """In this context, forwards without gradient form L and R of each adapter once instead of in every call.

    Meant for decoding, where forming them costs as much as reading the base weight. `generate` of an adapted model uses
    it.

    A write to an adapter in between forms its pair anew. A write through `.data` leaves no trace and is missed. That is
    why pairs are held for a context, and not for as long as a model is in eval mode.
    """
    token = _held.set({})
    try:
        yield
    finally:
        _held.reset(token)


def _held_pair(parts: Parts, dtype: torch.dtype) -> Pair:
    """The pair in a dtype: held by this context, if formed from these tensors as they are now; else a new one."""
    held = _held.get()
    if held is None:
        return _formed(parts, dtype)
    state = [(part.data_ptr(), 0 if part.is_inference() else part._version) for part in parts]
    known = held.get((id(parts.dU), dtype))
    if known is None or known[0] != state:
        known = state, _formed(parts, dtype), parts  # keeping the parts keeps other tensors off their addresses
        held[id(parts.dU), dtype] = known
    return known[1]


def _formed(parts: Parts, dtype: torch.dtype) -> Pair:
    L, R = parts.pair()
    return L.to(dtype), R.to(dtype)
