"""The plug-in: the engines, and how frozen factors survive under them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sorsa_plugin.extend import Engine, Factor, hookimpl

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    import torch


@hookimpl
def sorsa_engine(factors: list[Factor], optimizer: Any) -> Engine | None:
    """FSDP2 and DeepSpeed ZeRO; FSDP1 is refused."""
    from .engines import engine_of

    return engine_of(factors, optimizer)


@hookimpl
def sorsa_frozen_as_parameters() -> bool | None:
    """Buffers under DeepSpeed: it casts frozen parameters to 16 bits, and leaves them out of the adapter it saves."""
    from .deepspeed_compat import is_configured

    return False if is_configured() else None


@hookimpl
def sorsa_gather(parameters: list[torch.nn.Parameter]) -> AbstractContextManager[Any]:
    """Whole parameters under ZeRO 3."""
    from .deepspeed_compat import gathered

    return gathered(parameters)
