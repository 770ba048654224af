"""y + x (U S V^T - U0 S0 V0^T)^T: the change that an adapter makes to a layer's output; knows no layer or adapter.

With L = [dU * S, U0] (out x 2r) and R = [V, V0 * dS + dV * S] (in x 2r) the change is (x R) L^T. For an output
gradient g, with C1 = x V (the first r columns of x R), D = g L and K = g^T C1:

    grad x = D R^T      grad dU = K * S      grad dS = diag(U^T K)      grad dV = x^T (D1 + D2 * S)

because g U S = D1 + D2 * S. Five products of r columns each way in all; no out x in matrix is ever formed, and x and
x V are all that is kept for backward.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch


class Parts(NamedTuple):
    """Offsets and initial factors of one adapter: dU, U0 (out x r), dS, S0 (r), dV, V0 (in x r)."""

    dU: torch.Tensor
    dS: torch.Tensor
    dV: torch.Tensor
    U0: torch.Tensor
    S0: torch.Tensor
    V0: torch.Tensor

    def pair(self) -> tuple[torch.Tensor, torch.Tensor]:
        """L (out x 2r) and R (in x 2r), in the factors' dtype: formed in fp32, cast by whoever multiplies."""
        dS = self.dS.unsqueeze(-2)  # for stacks of matrices
        S = self.S0.unsqueeze(-2) + dS
        L = torch.cat((self.dU * S, self.U0), dim=-1)
        R = torch.cat((self.V0 + self.dV, self.V0 * dS + self.dV * S), dim=-1)
        return L, R


def add_low_rank(y: torch.Tensor, x: torch.Tensor, parts: Parts) -> torch.Tensor:
    """Add the change to a base output, in its dtype; `y` is consumed.

    Args:
        y: base output (... x out), fresh from the base layer: it is written to.
        x: input (... x in) of any floating dtype; products are computed in the dtype of `y`.
        parts: the adapter's tensors, fp32.

    Returns:
        y + (x R) L^T (... x out). Differentiable once, with respect to y, x and the offsets.
    """
    if torch.compiler.is_compiling():  # the compiler fuses this better than it could a custom function
        L, R = parts.pair()
        return y + (x.to(y.dtype) @ R.to(y.dtype)) @ L.to(y.dtype).mT
    return _AddLowRank.apply(y, x, *parts)


class _AddLowRank(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: torch.Tensor, x: torch.Tensor, *tensors: torch.Tensor) -> torch.Tensor:
        parts = Parts(*tensors)
        with torch.autocast(y.device.type, enabled=False):
            L, R = (part.to(y.dtype) for part in parts.pair())
            C = _rows(x).to(y.dtype) @ R
            if y.is_contiguous():
                y.view(-1, y.shape[-1]).addmm_(C, L.mT)
            else:
                y.add_((C @ L.mT).view(y.shape))
        ctx.mark_dirty(y)
        ctx.save_for_backward(x, C[:, : parts.dS.shape[0]].contiguous(), *parts)  # not a view: frees half of C
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, C1, *tensors = ctx.saved_tensors
        parts = Parts(*tensors)
        rank = parts.dS.shape[0]
        grads: dict[str, torch.Tensor] = {}
        with torch.autocast(g.device.type, enabled=False):
            G, S = _rows(g), parts.S0 + parts.dS
            needs_x, needs_offsets = ctx.needs_input_grad[1], any(ctx.needs_input_grad[2:5])
            L, R = (part.to(g.dtype) for part in parts.pair())
            D = G @ L
            if needs_x:
                grads["x"] = (D @ R.mT).view(x.shape).to(x.dtype)
            if needs_offsets:
                K = (G.mT @ C1).to(S.dtype)
                grads["dU"] = K * S
                grads["dS"] = (K * (parts.U0 + parts.dU)).sum(0)
                gUS = torch.addcmul(D[:, :rank], D[:, rank:], S.to(g.dtype))
                grads["dV"] = (_rows(x).to(g.dtype).mT @ gUS).to(S.dtype)
        for name, offset in zip(("dU", "dS", "dV"), parts, strict=False):
            if name in grads:
                grads[name] = grads[name].to(offset.dtype)
        return g, grads.get("x"), grads.get("dU"), grads.get("dS"), grads.get("dV"), None, None, None


def _rows(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1, tensor.shape[-1])
