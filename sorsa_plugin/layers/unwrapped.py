"""Shows a model without its adapters while a context lasts, for code that looks for the model's own modules."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from ..compat.peft import AuxiliaryTrainingWrapper
from .layer import SORSALayer


@contextmanager
def without_adapters(base: nn.Module) -> Iterator[None]:
    """In this context the model has its own base modules in place of adapted and fully trained ones."""
    swapped: dict[str, Any] = {}
    inside = " "  # a prefix that no module's name has
    for name, module in base.named_modules():
        if isinstance(module, (SORSALayer, AuxiliaryTrainingWrapper)) and not name.startswith(inside):
            swapped[name], inside = module, f"{name}."
    try:
        for name, module in swapped.items():
            own = module.get_base_layer() if isinstance(module, SORSALayer) else module.original_module
            base.set_submodule(name, own)
        yield
    finally:
        for name, module in swapped.items():
            base.set_submodule(name, module)
