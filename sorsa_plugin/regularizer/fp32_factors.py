"""Keeps what an optimizer steps in fp32: offsets that were cast to 16 bits come back, rounded factors are refused."""

from __future__ import annotations

from typing import Any

import torch

from ..errors import AttachError
from ..files.adapter_format import FROZEN, OFFSETS
from ..layers.factors import ROUNDED
from ..rank_zero import say
from .engines import Engine
from .trained_factors import trained_adapters


def require_fp32(layers: list[Any], engine: Engine) -> None:
    """Make the optimizer step fp32 offsets: cast back those that were cast to 16 bits.

    Raises:
        AttachError: an engine rounded the frozen factors, rounded offsets were sharded, or the optimizer has state for
            rounded offsets.
    """
    adapters = [adapter.tensors for adapter in trained_adapters(layers)]
    if any(getattr(adapter, name).dtype in ROUNDED for adapter in adapters for name in FROZEN):
        raise AttachError(
            "The frozen factors were cast to 16 bits, where they are no longer the triplets of the base weight; "
            "expected fp32. An engine casts parameters and leaves buffers alone: see docs/distributed.md."
        )
    if not engine.owns_parameters:
        return
    offsets = [adapter.get_parameter(name) for adapter in adapters for name in OFFSETS]
    if any(offset.dtype in ROUNDED and type(offset.data) is not torch.Tensor for offset in offsets):
        raise AttachError(
            "The SORSA offsets were cast to 16 bits before they were sharded, and sharded ones cannot be cast back; "
            "expected fp32, which small learning rates need. TRL casts those on quantised bases, and "
            "autocast_adapter_dtype=False does. Pass SORSACallback() to the trainer, or leave the option out."
        )
    restored = [offset for adapter in adapters for offset in adapter.restore_fp32()]
    if any(engine.optimizer.state.get(parameter) for parameter in restored):  # type: ignore[union-attr]
        raise AttachError(
            f"{len(restored)} SORSA offsets had been cast to 16 bits and the optimizer already holds state for them; "
            "expected fp32, which small learning rates need. Pass SORSACallback() to the trainer, or cast them back "
            "before the optimizer takes its first step."
        )
    if restored:
        say("%d SORSA offsets had been cast to 16 bits; they train in fp32.", len(restored))
