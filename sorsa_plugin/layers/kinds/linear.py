"""The linear kinds: nn.Linear and transformers' Conv1D.

Where the base module does nothing but x W^T + b with frozen tensors, the change's autograd function sees to their
gradient as well (`linalg/offset_form.py`), and the module runs without a graph. Any other base module keeps its own
graph: one with hooks, whose tensors somebody looks at; one that a library has wrapped (offloading) or whose weight is
no plain tensor (quantised, sharded); one with something to train; one whose dtype autocast changes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.modules.module import _has_any_global_hook

from ...compat.transformers import Conv1D
from ...linalg.offset_form import add_low_rank, left_to_autograd
from ...linalg.precision import autocast_dtype
from ...linalg.residual_form import add_triplets
from ...plugins import hookimpl
from ..layer import SORSALayer
from ..storage import is_quantised
from .additive import AdditiveLayer
from .transposed import TransposedLayer

if TYPE_CHECKING:
    from ...config import SORSAConfig

LIBRARIES = ("torch.nn.", "transformers.pytorch_utils", "bitsandbytes.nn.")
"""Where the forwards are defined whose output is a new tensor that nothing else holds."""

PRODUCTS = (nn.Linear, Conv1D)
PLAIN = (torch.Tensor, nn.Parameter)
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
ENGINES = ("ds_id", "_is_fsdp_flattened")
"""Attributes by which DeepSpeed and FSDP know the weights that they gather and free around a module's own forward."""


class SORSALinear(AdditiveLayer):
    """SORSA on nn.Linear: W is stored (out x in), x is (... x in) and y is (... x out)."""

    foldable = True

    def base_matrix(self) -> torch.Tensor:
        return self.get_base_layer().weight

    def delta_to_weight(self, delta: torch.Tensor) -> torch.Tensor:
        return delta

    def base_output(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """base(x); a copy where others may hold it too: a hook that saw it, or a forward of the module's own, which may
        keep it for its backward or have given its input."""
        base = self.base_layer
        y = base(x, *args, **kwargs)
        if left_to_autograd():  # which writes to nothing
            return y
        seen = base._forward_hooks or _has_any_global_hook()
        return y.clone() if seen or not type(base).forward.__module__.startswith(LIBRARIES) else y

    def add_change(self, y: torch.Tensor, x: torch.Tensor, adapter_name: str) -> torch.Tensor:
        return add_low_rank(y, self.sorsa_dropout[adapter_name](x), self.ready_factors(adapter_name).parts())

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """As every additive layer's; where it can be, base and change are one node of the graph."""
        names = self.adapters_in_use()
        undropped = bool(names) and isinstance(self.sorsa_dropout[names[0]], nn.Identity)
        if args or kwargs or not undropped or not is_frozen_product(self.base_layer, x):
            return super().forward(x, *args, **kwargs)
        with torch.no_grad():
            y = self.base_layer(x).detach()  # no view (a biased layer gives one), which would be copied
        add = add_low_rank if self.weight_state.is_whole else add_triplets
        y = add(y, x, self.ready_factors(names[0]).parts(), self.base_matrix())
        for name in names[1:]:
            y = self.add_change(y, x, name)
        return y


class SORSAConv1DLinear(TransposedLayer, SORSALinear):
    """SORSA on transformers' Conv1D (GPT-2): W is stored (in x out).

    "Linear" is in the name because PEFT knows by it what "all-linear" means on a model that is adapted already.
    """


def is_frozen_product(base: nn.Module, x: torch.Tensor) -> bool:
    """Whether base(x) is x W^T + b and no more, with a gradient for x alone, in the dtype of x."""
    if left_to_autograd() or not (torch.is_grad_enabled() and x.requires_grad) or type(base) not in PRODUCTS:
        return False
    if "forward" in vars(base) or any(getattr(base, hooks) for hooks in HOOKS) or _has_any_global_hook():
        return False
    # after the hooks, which ZeRO 3 has on every module: it gathers a weight that somebody looks at
    tensors = [base.weight] if base.bias is None else [base.weight, base.bias]
    if any(hasattr(base.weight, engine) for engine in ENGINES) or any(tensor.requires_grad for tensor in tensors):
        return False
    dtype = autocast_dtype(x.device.type) or x.dtype
    return all(type(tensor) in PLAIN and tensor.dtype == dtype for tensor in (x, *tensors))


@hookimpl
def sorsa_layer(target: nn.Module, config: SORSAConfig) -> type[SORSALayer] | None:
    """The kinds of this file: nn.Linear and transformers' Conv1D, subclasses of theirs included.

    Not nn.MultiheadAttention's out_proj: the attention reads its weight and never calls it (see `attention.py`). Not
    quantised linears, whose kinds are plug-ins: see `quantised.py`.
    """
    if isinstance(target, Conv1D):
        return SORSAConv1DLinear
    if not isinstance(target, nn.Linear) or isinstance(target, NonDynamicallyQuantizableLinear):
        return None
    return None if is_quantised(target) else SORSALinear
