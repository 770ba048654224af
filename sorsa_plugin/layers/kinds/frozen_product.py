"""Base modules that do nothing but x W^T + b with frozen tensors: the change's autograd function sees to their gradient
as well (`offset_form.py`), and the module runs without a graph.

Any other base module keeps its own graph: one with hooks, whose tensors somebody looks at; one that a library has
wrapped (offloading) or whose weight is no plain tensor (quantised, sharded); one with something to train; one whose
dtype autocast changes.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.modules.module import _has_any_global_hook
from transformers.pytorch_utils import Conv1D

from ...linalg.offset_form import left_to_autograd
from ...linalg.precision import autocast_dtype

KINDS = (nn.Linear, Conv1D)
PLAIN = (torch.Tensor, nn.Parameter)
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
ENGINES = ("ds_id", "_is_fsdp_flattened")
"""Attributes by which DeepSpeed and FSDP know the weights that they gather and free around a module's own forward."""


def is_frozen_product(base: nn.Module, x: torch.Tensor) -> bool:
    """Whether base(x) is x W^T + b and no more, with a gradient for x alone, in the dtype of x."""
    if left_to_autograd() or not (torch.is_grad_enabled() and x.requires_grad) or type(base) not in KINDS:
        return False
    if "forward" in vars(base) or any(getattr(base, hooks) for hooks in HOOKS) or _has_any_global_hook():
        return False
    # after the hooks, which ZeRO 3 has on every module: it gathers a weight that somebody looks at
    tensors = [base.weight] if base.bias is None else [base.weight, base.bias]
    if any(hasattr(base.weight, engine) for engine in ENGINES) or any(tensor.requires_grad for tensor in tensors):
        return False
    dtype = autocast_dtype(x.device.type) or x.dtype
    return all(type(tensor) in PLAIN and tensor.dtype == dtype for tensor in (x, *tensors))
