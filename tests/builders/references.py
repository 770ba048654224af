"""What one adapted layer should give, in float64, and how far rounding may take it from that."""

from __future__ import annotations

import torch

from sorsa_plugin import SORSALayer

ROUNDOFF = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8}
"""Unit roundoff u: the largest relative error of rounding once to nearest."""


def paper_weights(layer: SORSALayer, adapter: str = "default") -> tuple[torch.Tensor, ...]:
    """W_r, U, S, V of the paper in float64: W_r = W - U0 S0 V0^T, from what the layer stores."""
    factors = layer.factors(adapter)
    U0, S0, V0, dU, dS, dV = (getattr(factors, name).detach().double() for name in ("U0", "S0", "V0", "dU", "dS", "dV"))
    residual = layer.base_matrix().detach().double() - (U0 * S0) @ V0.T
    return residual, U0 + dU, S0 + dS, V0 + dV


def paper_forward(layer: SORSALayer, x: torch.Tensor, adapter: str = "default") -> torch.Tensor:
    """y = x W_r^T + ((x V) * S) U^T + b in float64."""
    residual, U, S, V = paper_weights(layer, adapter)
    x = x.double()
    y = x @ residual.T + ((x @ V) * S) @ U.T
    bias = layer.get_base_layer().bias
    return y if bias is None else y + bias.detach().double()


def forward_bound(layer: SORSALayer, x: torch.Tensor, adapters: tuple[str, ...] = ("default",)) -> torch.Tensor:
    """Elementwise first-order bound on the rounding error of the layer's output, whatever the summation order.

    An inner product of n terms errs by at most n u times the product of the absolute values. The base product has `in`
    terms, x R then (x R) L^T have `in` + 2r; forming L and R takes at most 4 roundings, adding up 2 more per adapter.
    In 16 bits the sums are accumulated in fp32 and rounded once per product: then x R, R, L, the change, the base
    output and each sum count one 16-bit rounding each.
    """
    magnitude = x.double().abs() @ layer.base_matrix().detach().double().abs().T
    if layer.get_base_layer().bias is not None:
        magnitude = magnitude + layer.get_base_layer().bias.detach().double().abs()
    terms = layer.in_features
    for adapter in adapters:
        L, R = (part.detach().double().abs() for part in layer.factors(adapter).low_rank_pair())
        magnitude = magnitude + (x.double().abs() @ R) @ L.T
        terms += R.shape[1]
    exact = (terms + 6 * len(adapters)) * ROUNDOFF[torch.float32] * magnitude
    rounded = 0.0 if x.dtype == torch.float32 else (4 + 2 * len(adapters)) * ROUNDOFF[x.dtype]
    return exact + rounded * magnitude
