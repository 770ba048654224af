"""A plug-in for sorsa-plugin: teaches SORSA a layer it does not know, and adds a word for `adapter:`.

    pip install ./examples/third_party_plugin
    sorsa doctor                                 # lists it
    adapter: house-style                         # in a recipe

`ScaledLinear` stands for a layer of your own model code: a linear layer with a fixed scale on its output.
"""

from __future__ import annotations

import torch
from torch import nn

from sorsa_plugin.extend import (
    AdapterOptions,
    AdapterSetup,
    AdapterType,
    AdditiveLayer,
    SORSALayer,
    hookimpl,
    setup_adapter,
)


class ScaledLinear(nn.Module):
    """y = scale * x W^T."""

    def __init__(self, in_features: int, out_features: int, scale: float = 2.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out_features, in_features) * in_features**-0.5)
        self.scale = scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.scale * x @ self.weight.T


class SORSAScaledLinear(AdditiveLayer):
    """SORSA on `ScaledLinear`: W is stored (out x in), and the change is scaled as the output is."""

    def base_matrix(self) -> torch.Tensor:
        return self.get_base_layer().weight

    def delta_to_weight(self, delta: torch.Tensor) -> torch.Tensor:
        return delta

    def add_change(self, y: torch.Tensor, x: torch.Tensor, adapter_name: str) -> torch.Tensor:
        """y (... x out) with the change of x (... x in)."""
        L, R = self.ready_factors(adapter_name).low_rank_pair()
        return y + self.get_base_layer().scale * (self.sorsa_dropout[adapter_name](x) @ R) @ L.mT

    def lora_layout(self) -> tuple[str, ...]:
        """PEFT's LoRA knows no such layer, so that an export would be of no use."""
        return ("unsupported", "a ScaledLinear")


@hookimpl
def sorsa_layer(target: nn.Module, config: object) -> type[SORSALayer] | None:
    """The layer kind."""
    return SORSAScaledLinear if isinstance(target, ScaledLinear) else None


@hookimpl
def sorsa_adapters() -> list[AdapterType]:
    """The adapter type."""
    return [AdapterType("house-style", "SORSA as our team runs it: every linear layer, decoupled", house_style)]


def house_style(options: AdapterOptions) -> AdapterSetup:
    """SORSA with other defaults; what the recipe says still wins."""
    common = {"r": 4, "target_modules": "all-linear", **options.common}
    return setup_adapter({"adapter": "sorsa", **common, "sorsa": {"reg_update": "decoupled", **options.own}})
