"""The plug-in: which kind adapts which of torchao's layers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from sorsa_plugin.extend import hookimpl

if TYPE_CHECKING:
    from sorsa_plugin import SORSAConfig, SORSALayer


@hookimpl
def sorsa_layer(target: nn.Module, config: SORSAConfig) -> type[SORSALayer] | None:
    """The kind for nn.Linear whose weight torchao stores as int8, weight-only.

    int8 activations are left out, because they have no gradient.
    """
    weight = getattr(target, "weight", None)
    if not isinstance(target, nn.Linear) or not type(weight).__module__.startswith("torchao."):
        return None
    from .linear_int8 import Int8Tensor, SORSALinearInt8

    return SORSALinearInt8 if isinstance(weight, Int8Tensor) and weight.act_quant_kwargs is None else None
