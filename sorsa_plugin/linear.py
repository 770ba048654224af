"""The linear kinds: nn.Linear and transformers' Conv1D."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from transformers.pytorch_utils import Conv1D

from .folding import add_initial, complete
from .hookspecs import hookimpl
from .layer import SORSALayer
from .lowrank import add_low_rank
from .mixed_batch import rows_by_adapter
from .quantisation import is_quantised

if TYPE_CHECKING:
    from .config import SORSAConfig


class SORSALinear(SORSALayer):
    """SORSA on nn.Linear: W is stored (out x in)."""

    foldable = True

    def base_matrix(self) -> torch.Tensor:
        return self.get_base_layer().weight

    def delta_to_weight(self, delta: torch.Tensor) -> torch.Tensor:
        return delta

    def forward(
        self, x: torch.Tensor, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any
    ) -> torch.Tensor:
        """(... x in) -> (... x out), in the dtype of the base layer's output.

        Of `adapter_names`, which `mixed_batch.py` hands over, each is the adapter of one row (dimension 0) of x.
        """
        self.unmerge_if_disabled()
        if adapter_names is not None and not self.disable_adapters:
            return self._mixed_forward(x, *args, adapter_names=adapter_names, **kwargs)
        y = self.base_output(x, *args, **kwargs)
        if self.folded is not None:
            return complete(self, y, x)
        for name in self.adapters_in_use():
            y = self._add_change(y, x, name)
        return y

    def base_output(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """What the base layer gives, in memory that nobody else looks at: it is written to."""
        return self.base_layer(x, *args, **kwargs)

    def _mixed_forward(self, x: torch.Tensor, *args: Any, adapter_names: list[str], **kwargs: Any) -> torch.Tensor:
        groups = rows_by_adapter(self, len(x), adapter_names)
        y = self.base_output(x, *args, **kwargs)
        if self.folded is not None:
            y = add_initial(y, x, self.ready_factors(self.folded.adapter).parts())
        for name, rows in groups.items():
            y[rows] = self._add_change(y[rows], x[rows], name)
        return y

    def _add_change(self, y: torch.Tensor, x: torch.Tensor, adapter_name: str) -> torch.Tensor:
        return add_low_rank(y, self.sorsa_dropout[adapter_name](x), self.ready_factors(adapter_name).parts())


class SORSAConv1DLinear(SORSALinear):
    """SORSA on transformers' Conv1D (GPT-2): W is stored (in x out).

    "Linear" is in the name because PEFT knows by it what "all-linear" means on a model that is adapted already.
    """

    def base_matrix(self) -> torch.Tensor:
        return self.get_base_layer().weight.T

    def delta_to_weight(self, delta: torch.Tensor) -> torch.Tensor:
        return delta.T


@hookimpl
def sorsa_layer(target: nn.Module, config: SORSAConfig) -> type[SORSALayer] | None:
    """The kinds of this file: nn.Linear and transformers' Conv1D, subclasses of theirs included.

    Not nn.MultiheadAttention's out_proj: the attention reads its weight and never calls it. Not quantised linears,
    whose kinds are plug-ins: see `quantised.py`.
    """
    if isinstance(target, Conv1D):
        return SORSAConv1DLinear
    if not isinstance(target, nn.Linear) or isinstance(target, NonDynamicallyQuantizableLinear):
        return None
    return None if is_quantised(target) else SORSALinear
