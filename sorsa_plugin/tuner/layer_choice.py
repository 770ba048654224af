"""Which kind of SORSA layer a targeted module gets, and why some get none."""

from __future__ import annotations

import warnings

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.nn.modules.conv import _ConvNd
from transformers.pytorch_utils import Conv1D

from ..config import SORSAConfig
from ..errors import UnsupportedLayerError
from ..layers.layer import SORSALayer
from ..layers.storage import is_quantised
from ..plugins import manager
from ..qsorsa.residual import require_quantised
from ..rank_zero import say


def new_layer(config: SORSAConfig, target: nn.Module, name: str) -> SORSALayer:
    """The SORSA layer for a base module (adapted by another method or not), still without an adapter.

    Raises:
        UnsupportedLayerError: no kind fits, or the weight is computed from other parameters.
    """
    base: nn.Module = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
    layer_class = manager().hook.sorsa_layer(target=base, config=config)
    if layer_class is None and is_quantised(base):
        raise UnsupportedLayerError(
            f"Target module {name} of type {type(base).__name__} is quantised in a way that SORSA cannot adapt; "
            "bitsandbytes' Linear4bit and Linear8bitLt, quantised by moving them to their device, and torchao's "
            "int8 weight-only linears are. Load the base so, or unquantised, or add the module to exclude_modules."
        )
    if layer_class is None:
        raise UnsupportedLayerError(
            f"Target module {name} of type {type(base).__name__} is not supported by SORSA; unquantised "
            "nn.Linear, transformers' Conv1D, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d and "
            "nn.MultiheadAttention (as a whole) are, and what plug-ins add. Narrow target_modules, or add it to "
            "exclude_modules."
        )
    parameter = layer_class.parameter_name
    if hasattr(base, parameter) and parameter not in base._parameters:
        raise UnsupportedLayerError(
            f"The {parameter} of target module {name} is computed from other parameters (weight_norm, "
            "spectral_norm or another parametrization); expected a parameter of its own. Make it one, with "
            "torch.nn.utils.parametrize.remove_parametrizations() or torch.nn.utils.remove_weight_norm(), or add "
            "the module to exclude_modules."
        )
    stored_in_out = isinstance(base, Conv1D)
    if config.fan_in_fan_out != stored_in_out:
        warnings.warn(
            f"fan_in_fan_out is set to {config.fan_in_fan_out} but the target module {name} is a "
            f"{type(base).__name__}. Setting fan_in_fan_out to {stored_in_out}.",
            stacklevel=2,
        )
        config.fan_in_fan_out = stored_in_out
    layer = layer_class(target, name)
    if config.residual_base and not config.factors_from_file:
        require_quantised(layer)
    return layer


def say_unmatched(model: nn.Module, names: set[str], layers: list[SORSALayer]) -> None:
    """Say which of the names in target_modules adapted nothing: PEFT stops only where none of them does."""
    adapted = [layer.name for layer in layers]
    unmatched = sorted(name for name in names if not any(f".{path}".endswith(f".{name}") for path in adapted))
    if not unmatched:
        return
    stacks = {
        ".".join(f"{path}.{name}".split(".")[-3:])
        for path, module in model.named_modules()
        for name, parameter in module._parameters.items()
        if parameter is not None and parameter.ndim == 3 and not isinstance(module, _ConvNd)
    }
    remedy = f" Stacks of experts are named by target_parameters: {sorted(stacks)}." if stacks else ""
    say("target_modules names %s, and no module of that name is adapted.%s", ", ".join(unmatched), remedy)
