"""The linear kinds: nn.Linear and transformers' Conv1D."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from transformers.pytorch_utils import Conv1D

from .hookspecs import hookimpl
from .layer import SORSALayer
from .lowrank import add_low_rank

if TYPE_CHECKING:
    from .config import SORSAConfig


class SORSALinear(SORSALayer):
    """SORSA on nn.Linear: W is stored (out x in)."""

    def base_matrix(self) -> torch.Tensor:
        return self.get_base_layer().weight

    def delta_to_weight(self, delta: torch.Tensor) -> torch.Tensor:
        return delta

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """(... x in) -> (... x out), in the dtype of the base layer's output."""
        self.unmerge_if_disabled()
        y = self.base_layer(x, *args, **kwargs)
        for name in self.adapters_in_use():
            y = add_low_rank(y, self.sorsa_dropout[name](x), self.ready_factors(name).parts())
        return y


class SORSAConv1D(SORSALinear):
    """SORSA on transformers' Conv1D (GPT-2): W is stored (in x out)."""

    def base_matrix(self) -> torch.Tensor:
        return self.get_base_layer().weight.T

    def delta_to_weight(self, delta: torch.Tensor) -> torch.Tensor:
        return delta.T


@hookimpl
def sorsa_layer(target: nn.Module, config: SORSAConfig) -> type[SORSALayer] | None:
    """The kinds of this file: nn.Linear and transformers' Conv1D, subclasses of theirs included.

    Not nn.MultiheadAttention's out_proj: the attention reads its weight and never calls it.
    """
    if isinstance(target, Conv1D):
        return SORSAConv1D
    if isinstance(target, nn.Linear) and not isinstance(target, NonDynamicallyQuantizableLinear):
        return SORSALinear
    return None
