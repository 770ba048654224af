"""Single adapted layers, perturbed factors and float64 references, shared by the tests of the core package."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

import sorsa_plugin.tuner.initialise
from sorsa_plugin import SORSAConfig, SORSALayer
from sorsa_plugin.regularizer.trained_factors import sorsa_layers

ROUNDOFF = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8}
"""Unit roundoff u: the largest relative error of rounding once to nearest."""

KINDS = ("linear", "linear-without-bias", "conv1d")
SHAPES = {"square": (24, 24), "tall": (40, 16), "wide": (16, 40)}
"""(out, in)"""


class OneLayer(nn.Module):
    """A model of one adaptable layer, `proj`."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.proj = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.proj(x)


def make_base(
    kind: str = "linear", shape: tuple[int, int] = (24, 24), dtype: torch.dtype = torch.float32, seed: int = 0
) -> OneLayer:
    """A random layer whose weight has unit-variance rows of norm about 1, and a random bias."""
    out, inner = shape
    generator = torch.Generator().manual_seed(seed)
    layer = Conv1D(out, inner) if kind == "conv1d" else nn.Linear(inner, out, bias=kind == "linear")
    with torch.no_grad():
        layer.weight.copy_(torch.randn(layer.weight.shape, generator=generator) * inner**-0.5)
        if layer.bias is not None:
            layer.bias.copy_(torch.randn(out, generator=generator))
    return OneLayer(layer).to(dtype)


def adapt(base: nn.Module, r: int = 4, adapter: str = "default", **options: object) -> PeftModel:
    """The model with one SORSA adapter; Conv1D's storage order is declared, so that nothing warns."""
    conv = any(isinstance(module, Conv1D) for module in base.modules())
    options.setdefault("target_modules", ["proj"])
    return get_peft_model(base, SORSAConfig(r=r, fan_in_fan_out=conv, **options), adapter_name=adapter)


def only_layer(model: nn.Module) -> SORSALayer:
    (layer,) = sorsa_layers(model)
    return layer


@torch.no_grad()
def perturb(model: nn.Module, adapter: str = "default", scale: float = 0.1, seed: int = 3) -> None:
    """Move every factor of an adapter by about `scale` relative, as training would (offsets of every kind)."""
    generator = torch.Generator().manual_seed(seed)
    for layer in sorsa_layers(model):
        if adapter not in layer.sorsa_factors:  # tied layers use another layer's
            continue
        factors = layer.factors(adapter)
        for name in ("dU", "dS", "dV"):
            offset = getattr(factors, name)
            noise = torch.randn(offset.shape, generator=generator)
            size = factors.S0 if name == "dS" else offset.shape[0] ** -0.5
            offset.copy_(noise * size * scale)


def inputs(width: int, rows: int = 5, dtype: torch.dtype = torch.float32, seed: int = 11) -> torch.Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)).to(dtype)


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


def refuse_to_factorise(monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on, any factorisation of a layer's weight fails the test."""

    def factorise(*args: object, **kwargs: object) -> None:
        raise AssertionError("a weight was factorised")

    monkeypatch.setattr(sorsa_plugin.tuner.initialise, "factorise", factorise)


def snapshot(module: nn.Module) -> dict[str, torch.Tensor]:
    """A copy of every tensor of a module."""
    return copy.deepcopy(module.state_dict())


def assert_same_tensors(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name
