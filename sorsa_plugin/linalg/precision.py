"""The precision of products: that of their operands, or full fp32 where rounding would be mistaken for a result (gaps,
factorisation, fingerprints, merging)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch


def autocast_dtype(device: str) -> torch.dtype | None:
    """The dtype of products on a type of device, or None: that of their operands."""
    # the meta device has no autocast, and torch raises when it is asked
    on = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if on else None


def without_autocast(device: str) -> AbstractContextManager[Any]:
    """Products in the dtype of their operands on a type of device; free where autocast is off already."""
    return torch.autocast(device, enabled=False) if autocast_dtype(device) else _UNCHANGED


_UNCHANGED = nullcontext()


@contextmanager
def full_precision() -> Iterator[None]:
    """No autocast and no TF32 in this context, or in a function that it decorates.

    A gap is a difference of numbers near 1: in bf16 or TF32, the gap of orthonormal factors reads 1e-3 instead of 1e-6.
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
    """Give a setting back, as inherited from `torch.backends.fp32_precision` if it was: so it follows that again."""
    if setting == "fp32_precision":
        setattr(matmul, setting, "none")
    if getattr(matmul, setting) != previous:
        setattr(matmul, setting, previous)
