"""Recognises modules that store their weight quantised, from any library; imports none of them."""

from __future__ import annotations

import torch
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ..compat.transformers import Conv1D

PLAIN_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

LIBRARIES = ("bitsandbytes", "torchao", "optimum.quanto", "hqq", "gptqmodel", "auto_gptq", "awq", "aqlm", "eetq")
"""Packages whose linear modules are quantised, whatever dtype they store."""


def is_quantised(module: nn.Module) -> bool:
    """Whether a module's weight is no plain matrix.

    It may be packed (bitsandbytes), wrapped (torchao, quanto), of 8 bits (FP8), or under another name (GPTQ, AWQ, HQQ).
    """
    of_library = f"{type(module).__module__}.".startswith(tuple(f"{library}." for library in LIBRARIES))
    if of_library and not isinstance(module, nn.Embedding):  # bitsandbytes has plain embeddings too
        return True
    weight = getattr(module, "weight", None)
    if not isinstance(weight, torch.Tensor):
        return any(hasattr(module, name) for name in ("qweight", "W_q"))
    wrapped = is_traceable_wrapper_subclass(weight) and not hasattr(weight, "device_mesh")  # DTensor wraps plain rows
    return wrapped or weight.dtype not in PLAIN_DTYPES


def was_conv1d(module: nn.Module) -> bool:
    """Whether a quantised linear module replaced a Conv1D, whose weight transformers quantises transposed."""
    return issubclass(getattr(module, "source_cls", nn.Linear), Conv1D)
