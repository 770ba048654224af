"""The seams: what a plug-in can add, one sentence each.

To use one, register a module that implements some of them under the entry-point group "sorsa_plugin", and mark each
function with `@sorsa_plugin.hookimpl`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .plugins import hookspec

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from peft import PeftConfig
    from torch import nn

    from .config import SORSAConfig
    from .layers.layer import SORSALayer
    from .recipes.adapter_type import AdapterType
    from .regularizer.engines import Engine
    from .regularizer.trained_factors import Factor


@hookspec(firstresult=True)
def sorsa_layer(target: nn.Module, config: SORSAConfig) -> type[SORSALayer] | None:
    """The `SORSALayer` class for a base module of a kind that this plug-in knows, else None."""


@hookspec(firstresult=True)
def sorsa_engine(factors: list[Factor], optimizer: Any) -> Engine | None:
    """The `Engine` that holds these factors with this optimizer (wrapped, or None), if this plug-in knows it."""


@hookspec(firstresult=True)
def sorsa_frozen_as_parameters() -> bool | None:
    """True if this process's engine should get frozen factors as parameters (which it shards), False if as buffers
    (because it casts parameters), None if this plug-in knows no engine here."""


@hookspec
def sorsa_gather(parameters: list[nn.Parameter]) -> AbstractContextManager[Any]:  # type: ignore[empty-body]
    """A context in which the parameters that this plug-in's engine partitioned are whole on every process."""


@hookspec
def sorsa_adapters() -> list[AdapterType]:  # type: ignore[empty-body]
    """The adapter types that the key `adapter` of a recipe can name."""


@hookspec
def sorsa_callbacks(peft_config: PeftConfig) -> list[Any]:  # type: ignore[empty-body]
    """The Trainer callbacks that training with this PEFT config needs, or that log its metrics; else an empty list."""
