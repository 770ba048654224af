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

FLOOR = "frozen base"
LORA, PISSA, DORA = "PEFT LoRA", "PEFT PiSSA", "PEFT DoRA"
INTACT, FOLDED = "SORSA", "SORSA folded"
PUBLISHED, FULL = "published SORSA", "full fine-tuning"
PEERS = (FLOOR, LORA, PISSA, DORA, INTACT, FOLDED, PUBLISHED, FULL)
"""PiSSA trains LoRA's layer: how far it is from LoRA shows the noise."""

LORA_OPTIONS: dict[str, dict[str, Any]] = {
    LORA: {},
    PISSA: {"init_lora_weights": "pissa_niter_4"},
    DORA: {"use_dora": True},
}


def installed(name: str) -> bool:
    """Whether a peer can be built here: PyPI's `sorsa` is only read, and not every machine has it."""
    try:
        return name != PUBLISHED or importlib.metadata.distribution("sorsa") is not None
    except importlib.metadata.PackageNotFoundError:
        return False


def build(name: str, base: Callable[[], nn.Module], rank: int) -> nn.Module:
    """A peer around a fresh base model, on every linear; SORSA's factors are random, which costs the same."""
    options: dict[str, Any] = {"r": rank, "target_modules": "all-linear"}
    if name in (FLOOR, FULL):
        return base().requires_grad_(name == FULL)
    if name in LORA_OPTIONS:
        return get_peft_model(base(), LoraConfig(lora_alpha=rank, **LORA_OPTIONS[name], **options))
    if name == PUBLISHED:
        return published(base(), rank)
    if name not in (INTACT, FOLDED):
        raise ValueError(f"The peer is {name!r}; expected one of {', '.join(PEERS)}.")
    model = get_peft_model(base(), SORSAConfig(init_weights=False, **options))
    if name == FOLDED:
        model.fold()
    return model


def published(model: nn.Module, rank: int) -> nn.Module:
    """The layer of PyPI's `sorsa` 1.0.1 in place of every linear but the head; its package does not import any more."""
    path = importlib.metadata.distribution("sorsa").locate_file("sorsa/layer.py")
    specification = importlib.util.spec_from_file_location("published_sorsa_layer", str(path))
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    model.requires_grad_(False)
    linears = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and "lm_head" not in n}
    for name, linear in linears.items():
        layer = module.Linear(linear.in_features, linear.out_features, r=rank, merge_weights=False)
        layer.to(linear.weight.device)
        layer.weight.data = linear.weight.data
        with torch.no_grad():
            for factor in (layer.sorsa_A, layer.sorsa_S, layer.sorsa_B):
                factor.normal_(std=rank**-0.5)
        model.set_submodule(name, layer)
    return model
