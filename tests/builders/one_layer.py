"""Models of one or two adaptable layers, adapted, and inputs for them."""

from __future__ import annotations

import torch
from peft import PeftModel, get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from sorsa_plugin import SORSAConfig, SORSALayer
from sorsa_plugin.layers.layer import sorsa_layers

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


class TwoLayers(nn.Module):
    """A Linear and a Conv1D."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(7, 12)
        self.conv1d = Conv1D(5, 12)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv1d(torch.tanh(self.linear(x)))


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


def inputs(width: int, rows: int = 5, dtype: torch.dtype = torch.float32, seed: int = 11) -> torch.Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)).to(dtype)
