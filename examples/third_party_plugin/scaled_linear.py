"""A plug-in for sorsa-plugin: teaches SORSA a layer it does not know, and adds a word for `adapter:`.

    pip install ./examples/third_party_plugin
    sorsa plugins                                # lists it
    adapter: house-style                         # in a recipe

`ScaledLinear` stands for a layer of your own model code: a linear layer with a fixed scale on its output.
"""

from __future__ import annotations

import torch
from torch import nn

from sorsa_plugin import AdapterSetup, AdapterType, SORSALayer, hookimpl, setup_adapter
from sorsa_plugin.adapters import AdapterOptions


class ScaledLinear(nn.Module):
    """y = scale * x W^T."""

    def __init__(self, in_features: int, out_features: int, scale: float = 2.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out_features, in_features) * in_features**-0.5)
        self.scale = scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.scale * x @ self.weight.T


class SORSAScaledLinear(SORSALayer):
    """SORSA on `ScaledLinear`: W is stored (out x in), and the change is scaled as the output is."""

    def base_matrix(self) -> torch.Tensor:
        return self.get_base_layer().weight

    def delta_to_weight(self, delta: torch.Tensor) -> torch.Tensor:
        return delta

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(... x in) -> (... x out)."""
        self.unmerge_if_disabled()
        y = self.base_layer(x)
        for name in self.adapters_in_use():
            L, R = self.ready_factors(name).low_rank_pair()
            y = y + self.get_base_layer().scale * (self.sorsa_dropout[name](x) @ R) @ L.mT
        return y


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
