"""Chooses the precision of products: that of their operands, or full fp32.

Full fp32 is for results that rounding would falsify: gaps, factorisation, fingerprints, merging.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch


def autocast_dtype(device: str) -> torch.dtype | None:
    """The dtype that autocast gives products on a type of device ("cpu", "cuda"); None if autocast is off there."""
    # the meta device has no autocast, and torch raises if asked about it
    on = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if on else None


def without_autocast(device: str) -> AbstractContextManager[Any]:
    """A context in which products on a type of device have their operands' dtype; free if autocast is off."""
    return torch.autocast(device, enabled=False) if autocast_dtype(device) else _UNCHANGED


_UNCHANGED = nullcontext()


@contextmanager
def full_precision() -> Iterator[None]:
    """No autocast and no TF32 in this context, or in a function that it decorates.

    A gap is a difference of numbers near 1. In bf16 or TF32, the gap of orthonormal factors reads 1e-3 instead of 1e-6.
    """
    devices = ["cpu"]
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if accelerator is not None:
        devices.append(accelerator.type)
    matmul = torch.backends.cuda.matmul
    setting = "fp32_precision" if hasattr(matmul, "fp32_precision") else "allow_tf32"
    exact = "ieee" if setting == "fp32_precision" else False
    previous = getattr(matmul, setting)
    with ExitStack() as stack:
        for device in devices:
            stack.enter_context(without_autocast(device))
        if previous != exact and torch.cuda.is_available():
            setattr(matmul, setting, exact)
            stack.callback(_restore, matmul, setting, previous)
        yield


def _restore(matmul: Any, setting: str, previous: Any) -> None:
    """Restore a setting. If it was inherited from `torch.backends.fp32_precision`, it follows that again."""
    if setting == "fp32_precision":
        setattr(matmul, setting, "none")
    if getattr(matmul, setting) != previous:
        setattr(matmul, setting, previous)
