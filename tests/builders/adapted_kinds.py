"""Adapted models of every kind, and their float64 reference: the same base with W + L R^T in the place of W."""

from __future__ import annotations

import copy
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch import nn

from builders.layer_kinds import KINDS, make_model
from sorsa_plugin import SORSAConfig, SORSALayer
from sorsa_plugin.layers.layer import sorsa_layers


def adapted(name: str, dtype: torch.dtype = torch.float32, r: int = 2, **options: Any) -> PeftModel:
    return get_peft_model(make_model(name, dtype), SORSAConfig(r=r, **{**KINDS[name].options, **options}))


def reference(name: str, model: nn.Module, deltas: dict[SORSALayer, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """The base model's output in float64 with each layer's weight replaced by W + its delta (in W's shape); the
    deltas may require gradients."""
    plain = copy.deepcopy(make_model(name)).double()
    replaced = {}
    for layer, delta in deltas.items():
        base, names = layer.get_base_layer(), dict(_unwrapped_names(model))
        replaced[f"{names[base]}.{layer.parameter_name}"] = layer.base_weight().detach().double() + delta
    return torch.func.functional_call(plain, replaced, (x.double() if x.is_floating_point() else x,))


def _unwrapped_names(model: nn.Module) -> list[tuple[nn.Module, str]]:
    prefix = "base_model.model."
    return [(module, name.removeprefix(prefix).replace(".base_layer", "")) for name, module in model.named_modules()]


def exact_delta(layer: SORSALayer, offsets: dict[str, torch.Tensor] | None = None) -> torch.Tensor:
    """U S V^T - U0 S0 V0^T in float64, as the method's formula has it, in the shape of the weight."""
    factors = layer.factors("default")
    part = {name: getattr(factors, name).detach().double() for name in ("dU", "dS", "dV", "U0", "S0", "V0")}
    part |= offsets or {}
    U, S, V = part["U0"] + part["dU"], part["S0"] + part["dS"], part["V0"] + part["dV"]
    delta = (U * S.unsqueeze(-2)) @ V.mT - (part["U0"] * part["S0"].unsqueeze(-2)) @ part["V0"].mT
    weight = layer.base_weight()
    if delta.shape == weight.shape:
        return delta
    return delta.mT if delta.mT.shape == weight.shape else delta.reshape(weight.shape)


def layers_of(model: nn.Module) -> list[SORSALayer]:
    return sorsa_layers(model)
