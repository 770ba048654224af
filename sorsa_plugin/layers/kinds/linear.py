"""The linear kinds: nn.Linear and transformers' Conv1D.

If the base module does nothing but x W^T + b with frozen tensors, it runs without a graph, and the change's autograd
function computes its gradient as well (`linalg/offset_form.py`). Any other base module keeps its own graph:

- one with hooks, because their owners look at its tensors;
- one that a library has wrapped (offloading), or whose weight is no plain tensor (quantised, sharded);
- one with something to train;
- one whose dtype autocast changes.
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
"""Packages whose modules' forwards return a new tensor that nothing else holds."""

PRODUCTS = (nn.Linear, Conv1D)
PLAIN = (torch.Tensor, nn.Parameter)
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
ENGINES = ("ds_id", "_is_fsdp_flattened")
"""Attributes by which DeepSpeed and FSDP know the weights that they gather and free around a module's own forward."""


class SORSALinear(AdditiveLayer):
    """SORSA on nn.Linear: W is stored (out x in), x is (... x in) and y is (... x out)."""

    foldable = True

    def base_matrix(self) -> torch.Tensor:
        """The stored weight (out x in)."""
        return self.get_base_layer().weight

    def delta_to_weight(self, delta: torch.Tensor) -> torch.Tensor:
        """The change (out x in) as it is."""
        return delta

    def base_output(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """base(x) (... x out) for x (... x in); a copy if other code may hold the output too.

        A hook may have seen it. A forward of the module's own may keep it for its backward, or return its input.
        """
        base = self.base_layer
        y = base(x, *args, **kwargs)
        if left_to_autograd():  # nothing will write to y
            return y
        seen = base._forward_hooks or _has_any_global_hook()
        return y.clone() if seen or not type(base).forward.__module__.startswith(LIBRARIES) else y

    def add_change(self, y: torch.Tensor, x: torch.Tensor, adapter_name: str) -> torch.Tensor:
        """y + (x R) L^T for y (... x out) and x (... x in), in the dtype of y. Consumes y."""
        return add_low_rank(y, self.sorsa_dropout[adapter_name](x), self.ready_factors(adapter_name).parts())

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """See `AdditiveLayer.forward`, for x (... x in). If possible, base and change are one node of the graph."""
        names = self.adapters_in_use()
        undropped = bool(names) and isinstance(self.sorsa_dropout[names[0]], nn.Identity)
        if args or kwargs or not undropped or not is_frozen_product(self.base_layer, x):
            return super().forward(x, *args, **kwargs)
        with torch.no_grad():
            y = self.base_layer(x).detach()  # a biased layer returns a view, which would be copied
        add = add_low_rank if self.weight_state.is_whole else add_triplets
        y = add(y, x, self.ready_factors(names[0]).parts(), self.base_matrix())
        for name in names[1:]:
            y = self.add_change(y, x, name)
        return y


class SORSAConv1DLinear(TransposedLayer, SORSALinear):
    """SORSA on transformers' Conv1D (GPT-2): W is stored (in x out).

    "Linear" is in the name because PEFT recognises adapted layers by it when "all-linear" meets an adapted model.
    """


def is_frozen_product(base: nn.Module, x: torch.Tensor) -> bool:
    """Whether base(x) for x (... x in) is x W^T + b and no more, with a gradient for x alone, in the dtype of x."""
    if left_to_autograd() or not (torch.is_grad_enabled() and x.requires_grad) or type(base) not in PRODUCTS:
        return False
    if "forward" in vars(base) or any(getattr(base, hooks) for hooks in HOOKS) or _has_any_global_hook():
        return False
    # only now: ZeRO 3 gathers a weight that is looked at, and its hooks on every module were found above
    tensors = [base.weight] if base.bias is None else [base.weight, base.bias]
    if any(hasattr(base.weight, engine) for engine in ENGINES) or any(tensor.requires_grad for tensor in tensors):
        return False
    dtype = autocast_dtype(x.device.type) or x.dtype
    return all(type(tensor) in PLAIN and tensor.dtype == dtype for tensor in (x, *tensors))


@hookimpl
def sorsa_layer(target: nn.Module, config: SORSAConfig) -> type[SORSALayer] | None:
    """The kinds of this file: nn.Linear and transformers' Conv1D, and their subclasses.

    Not nn.MultiheadAttention's out_proj: the attention reads its weight and never calls it (see `attention.py`). Not
    quantised linears, whose kinds are plug-ins (see `quantised.py`).
    """
    if isinstance(target, Conv1D):
        return SORSAConv1DLinear
    if not isinstance(target, nn.Linear) or isinstance(target, NonDynamicallyQuantizableLinear):
        return None
    return None if is_quantised(target) else SORSALinear
