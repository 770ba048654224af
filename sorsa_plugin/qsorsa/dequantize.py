"""Makes a model without quantised weights, with its adapters merged, so that few bits round nothing away."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from tqdm.auto import tqdm

from ..compat.accelerate import add_hook_to_module, hook_of, remove_hook_from_module
from ..compat.transformers import Conv1D
from ..config import SORSAConfig
from ..errors import UnsupportedLayerError
from ..layers.kinds.quantised import MergeRounding, SORSAQuantisedLinear, say_rounding
from ..layers.layer import sorsa_layers
from ..layers.storage import is_quantised, was_conv1d
from ..plugins import manager
from .residual import ConfigMark

if TYPE_CHECKING:
    from peft import PeftModel


@torch.no_grad()
def merge_and_dequantize(
    model: PeftModel, dtype: torch.dtype = torch.bfloat16, adapter_names: list[str] | None = None
) -> nn.Module:
    """The base model in one dtype, no weight quantised, with adapters merged in fp32 and rounded once, layer by layer.

    `merge_and_unload` stores W + change in few bits again. This function stores it in 16: about four times the memory
    of a 4-bit base, and all of the change. Like `merge_and_unload`, it consumes the model.

    Args:
        model: a PEFT model with SORSA adapters on a quantised base.
        dtype: of the result, a floating-point dtype.
        adapter_names: the adapters to merge; None for the active ones.

    Raises:
        ValueError: dtype is no floating-point dtype, the model has no SORSA adapter, or an adapter name is unknown.
        UnsupportedLayerError: a module outside the adapter is quantised in a way that no plug-in can read.
    """
    if not dtype.is_floating_point:
        raise ValueError(f"dtype is {dtype}; expected a floating-point one, such as torch.bfloat16.")
    layers = {name: layer for name, layer in _base(model).named_modules() if isinstance(layer, SORSAQuantisedLinear)}
    if not sorsa_layers(model):
        raise ValueError(f"{type(model).__name__} has no SORSA adapter to merge. Give the model of get_peft_model().")
    unknown = sorted(set(adapter_names or []) - set(model.peft_config))
    if unknown:
        raise ValueError(f"adapter_names has {', '.join(unknown)}; the model has {', '.join(model.peft_config)}.")
    others = _quantised_modules(_base(model), layers)
    errors = {}
    for name, layer in tqdm(layers.items(), desc="SORSA: merging", unit="layer", disable=len(layers) < 50, leave=False):
        asked = layer.active_adapters if adapter_names is None else adapter_names
        merged = list(dict.fromkeys([*layer.merged_adapters, *asked]))  # as in PEFT, earlier merges stay
        errors[name] = _replace(_base(model), name, layer, merged, dtype)
    for name, layer in others.items():
        _replace(_base(model), name, layer, [], dtype)
    unloaded = model.base_model.merge_and_unload(adapter_names=adapter_names)
    ConfigMark.of(unloaded).forget()
    _forget_quantisation(unloaded)
    say_rounding(f"Merging stored %d weights in {str(dtype).removeprefix('torch.')}", errors)
    return _cast(unloaded, dtype)


def _base(model: PeftModel) -> nn.Module:
    return model.base_model.model


def _quantised_modules(base: nn.Module, adapted: dict[str, SORSAQuantisedLinear]) -> dict[str, SORSAQuantisedLinear]:
    """The quantised modules without an adapter, as layers that can read them."""
    found = {}
    inside = tuple(f"{name}." for name in adapted)
    for name, module in base.named_modules():
        if name in adapted or name.startswith(inside) or not is_quantised(module):
            continue
        kind = manager().hook.sorsa_layer(target=module, config=SORSAConfig())
        if kind is None or not issubclass(kind, SORSAQuantisedLinear):
            raise UnsupportedLayerError(
                f"{name} of type {type(module).__name__} is quantised in a way that no plug-in can read. Merge "
                "into the quantised base with merge_and_unload()."
            )
        found[name] = kind(module, name)
    return found


def _replace(base: nn.Module, name: str, layer: Any, adapters: list[str], dtype: torch.dtype) -> MergeRounding:
    """Replace a quantised module by a plain one, of the kind that was quantised, with the merged weight."""
    names = [adapter for adapter in adapters if adapter in layer.sorsa_factors]
    total, before = layer.merged_weight(names), layer.merged_weight([])
    old = layer.get_base_layer()
    weight = total.to(dtype)
    with torch.device("meta"):
        if was_conv1d(old):
            linear: nn.Module = Conv1D(old.out_features, old.in_features)
        else:
            linear = nn.Linear(old.in_features, old.out_features, bias=old.bias is not None)
    linear.weight = nn.Parameter(weight.T.contiguous() if was_conv1d(old) else weight, requires_grad=False)
    if old.bias is not None:
        linear.bias = nn.Parameter(old.bias.data.to(dtype), requires_grad=False)
    hook = hook_of(old)
    if hook is not None:
        remove_hook_from_module(old)
        add_hook_to_module(linear, hook)
    base.set_submodule(name, linear.train(layer.training))
    return MergeRounding.between(weight, total, before)


def _cast(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Cast what a checkpoint holds. Buffers that a model computes (rotary frequencies) keep their dtype."""
    for tensor in model.state_dict(keep_vars=True).values():
        if isinstance(tensor, torch.Tensor) and tensor.is_floating_point():
            tensor.data = tensor.data.to(dtype)
    return model


def _forget_quantisation(model: Any) -> None:
    """Remove what transformers' own `dequantize` removes."""
    quantiser = getattr(model, "hf_quantizer", None)
    if quantiser is not None:
        quantiser.remove_quantization_config(model)
    for flag in ("is_loaded_in_4bit", "is_loaded_in_8bit"):
        if getattr(model, flag, False):
            setattr(model, flag, False)
