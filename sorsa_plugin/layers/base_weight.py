"""Brings base weights here while code reads them: from the CPU or disk (accelerate), or other processes (engines)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from typing import Any, TypeVar

import torch
from torch import nn

from ..compat.accelerate import align_module_device, execution_device, remove_hook_from_module
from ..errors import UnsupportedLayerError
from ..plugins import manager

Method = TypeVar("Method", bound=Callable[..., Any])


@contextmanager
def base_weight_here(module: nn.Module) -> Iterator[None]:
    """In this context the parameters of a base module are whole, on the device that computes. Do not write to them.

    If an engine partitioned them, every process has to enter together.
    """
    with ExitStack() as stack:
        stack.enter_context(align_module_device(module))
        if not torch.compiler.is_compiling():  # a compiled graph reads weights that are here already
            for context in manager().hook.sorsa_gather(parameters=list(module.parameters(recurse=False))):
                stack.enter_context(context)
        yield


def with_base_weight(method: Method) -> Method:
    """Decorates a method of a layer that reads the base weight: it runs in `base_weight_here`."""

    @wraps(method)
    def wrapper(layer: Any, *args: Any, **kwargs: Any) -> Any:
        with base_weight_here(layer.get_base_layer()):
            return method(layer, *args, **kwargs)

    return wrapper  # type: ignore[return-value]


def device_of(module: nn.Module, weight: torch.Tensor) -> torch.device:
    """The device on which a base module computes with its weight (any shape).

    That is the weight's own device, or the one to which accelerate brings an offloaded weight.
    """
    execution = execution_device(module)
    return weight.device if execution is None else execution


def keep_here(module: nn.Module) -> None:
    """Undo accelerate's offloading of a module that is never called: accelerate would never bring its tensors back."""
    execution = execution_device(module)
    if execution is not None:
        remove_hook_from_module(module)  # brings the values back
        module.to(execution)


def refuse_sharded(weight: Any, path: str) -> None:
    """Refuse a weight of which each process keeps a part for good, as under tensor parallelism.

    Args:
        weight: the base weight.
        path: its dotted name, for messages.

    Raises:
        UnsupportedLayerError: the weight is a DTensor.
    """
    if hasattr(weight, "placements"):
        raise UnsupportedLayerError(
            f"{path} is a DTensor placed as {tuple(weight.placements)}; expected a whole weight. Tensor parallelism "
            "(tp_plan, parallelize_module) is not supported on adapted layers: exclude them, or load the model without "
            "a plan. For FSDP2 call get_peft_model() first, and shard the result."
        )
