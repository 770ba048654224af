"""The methods that are measured side by side, on one layer or on a whole model."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from sorsa_plugin import SORSAConfig
from sorsa_plugin.layer import SORSALayer

FLOOR = "frozen base"
LORA = "PEFT LoRA"
INTACT, FOLDED = "SORSA", "SORSA folded"
PEERS = (FLOOR, LORA, "PEFT DoRA", INTACT, FOLDED, "published SORSA", "full fine-tuning")
"""PiSSA trains LoRA's layer: it differs at initialisation only."""


def build(name: str, base: Callable[[], nn.Module], rank: int, targets: Any) -> nn.Module:
    """A peer around a fresh base model; factors are random, because what they hold does not change the cost."""
    options: dict[str, Any] = {"r": rank, "target_modules": targets}
    if name == FLOOR:
        return base().requires_grad_(False)
    if name == "full fine-tuning":
        return base().requires_grad_(True)
    if name == "published SORSA":
        return published(base(), rank, targets)
    if name in (LORA, "PEFT DoRA"):
        return get_peft_model(base(), LoraConfig(lora_alpha=rank, use_dora=name == "PEFT DoRA", **options))
    if name not in (INTACT, FOLDED):
        raise ValueError(f"The peer is {name!r}; expected one of {', '.join(PEERS)}.")
    model = get_peft_model(base(), SORSAConfig(init_weights=False, **options))
    if name == FOLDED:
        model.fold()
    return model


def published(model: nn.Module, rank: int, targets: Any) -> nn.Module:
    """The layer of PyPI's `sorsa` 1.0.1 in place of the targeted linears; its package does not import any more."""
    path = importlib.metadata.distribution("sorsa").locate_file("sorsa/layer.py")
    specification = importlib.util.spec_from_file_location("published_sorsa_layer", str(path))
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    model.requires_grad_(False)
    adapted = get_peft_model(model, SORSAConfig(r=rank, target_modules=targets, init_weights=False))
    names = [layer.name for layer in adapted.modules() if isinstance(layer, SORSALayer)]
    plain = adapted.unload()
    for name in names:
        linear = plain.get_submodule(name)
        layer = module.Linear(linear.in_features, linear.out_features, r=rank, merge_weights=False)
        layer.to(linear.weight.device)
        layer.weight.data = linear.weight.data
        with torch.no_grad():
            for factor in (layer.sorsa_A, layer.sorsa_S, layer.sorsa_B):
                factor.normal_(std=rank**-0.5)
        parent = plain.get_submodule(name.rpartition(".")[0])
        setattr(parent, name.rpartition(".")[2], layer)
    return plain
