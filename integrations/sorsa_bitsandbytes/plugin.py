"""The plug-in: which kind adapts which of bitsandbytes' layers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sorsa_plugin.extend import hookimpl

if TYPE_CHECKING:
    from torch import nn

    from sorsa_plugin import SORSAConfig, SORSALayer


@hookimpl
def sorsa_layer(target: nn.Module, config: SORSAConfig) -> type[SORSALayer] | None:
    """The kinds for Linear4bit and Linear8bitLt, and their subclasses, if the weight is quantised.

    A weight on the meta device counts as quantised: its model is being loaded. Linear8bitLt(has_fp16_weights=True),
    which trains the weight itself, is left out.
    """
    if not any(kind.__module__.startswith("bitsandbytes.") for kind in type(target).__mro__):
        return None
    from bitsandbytes.nn import Linear4bit, Linear8bitLt

    if isinstance(target, Linear4bit):
        from .linear_4bit import SORSALinear4bit

        quantised = target.weight.is_meta or getattr(target.weight, "quant_state", None) is not None
        return SORSALinear4bit if quantised else None
    if isinstance(target, Linear8bitLt):
        from .linear_8bit import SORSALinear8bit

        quantised = target.weight.is_meta or target.weight.dtype.itemsize == 1
        return SORSALinear8bit if quantised and not target.state.has_fp16_weights else None
    return None
