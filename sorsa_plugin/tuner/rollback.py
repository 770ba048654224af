"""Puts an adapter on a model whole or not at all: the next attempt would train what a failed one left behind."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from ..compat.peft import AuxiliaryTrainingWrapper
from ..config import SORSAConfig
from ..layers.layer import SORSALayer


@contextmanager
def whole_or_not_at_all(model: nn.Module, adapter_name: str, configs: dict[str, SORSAConfig]) -> Iterator[None]:
    """A context in which the adapter of one of the configs is added. If it ends with an error, the addition is undone.

    The model and that config are then as before, and the config is no longer in `configs`. One thing cannot be undone:
    a layer whose base already stores the adapter's residual stays as it is.
    """
    config = configs[adapter_name]
    options = copy.deepcopy(config.__dict__)
    # keyed by names: a reference to a parameter would keep in memory a weight that a residual has replaced
    trained = {
        module: {name: p.requires_grad for name, p in module._parameters.items() if p is not None}
        for module in model.modules()
    }
    try:
        yield
    except BaseException:
        take_off(model, adapter_name)
        for module, flags in trained.items():
            for name, parameter in module._parameters.items():
                if parameter is not None and parameter.requires_grad != flags.get(name, parameter.requires_grad):
                    parameter.requires_grad_(flags[name])
        config.__dict__.clear()
        config.__dict__.update(options)
        configs.pop(adapter_name, None)
        raise


def take_off(model: nn.Module, adapter_name: str) -> None:
    """Remove an adapter, complete or not, from every layer and from every module that is trained in full.

    Layers and wrappers left without an adapter give their place back to the base module. A layer stays if its base
    stores the residual of this adapter alone.
    """
    wrappers = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent._modules.items()
        if isinstance(child, (SORSALayer, AuxiliaryTrainingWrapper))
    ]
    for parent, name, wrapper in reversed(wrappers):  # inner ones first
        if isinstance(wrapper, SORSALayer):
            if adapter_name in wrapper.configs and not wrapper.weight_state.needs(wrapper, adapter_name):
                wrapper.delete_adapter(adapter_name)
            if not wrapper.configs:
                setattr(parent, name, wrapper.base_layer)
        else:
            others = wrapper._get_available_adapters() - {adapter_name}
            wrapper.delete_adapter(adapter_name, [other for other in wrapper.active_adapters if other in others])
            if not others:
                setattr(parent, name, wrapper.original_module)
