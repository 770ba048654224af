"""Adapters that have moved as training would move them, and comparisons of tensors."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import PreTrainedModel

import sorsa_plugin.tuner.initialise
from builders.llama import tiny_llama
from sorsa_plugin import SORSAConfig
from sorsa_plugin.layers.layer import sorsa_layers


@torch.no_grad()
def perturb(model: nn.Module, adapter: str = "default", scale: float = 0.1, seed: int = 3) -> None:
    """Move every factor of an adapter by about `scale` relative, as training would (offsets of every kind)."""
    generator = torch.Generator().manual_seed(seed)
    for layer in sorsa_layers(model):
        if adapter not in layer.sorsa_factors:  # tied layers use another layer's
            continue
        factors = layer.factors(adapter)
        for name in ("dU", "dS", "dV"):
            offset = getattr(factors, name)
            noise = torch.randn(offset.shape, generator=generator)
            size = factors.S0 if name == "dS" else offset.shape[0] ** -0.5
            offset.copy_(noise * size * scale)


def refuse_to_factorise(monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on, any factorisation of a layer's weight fails the test."""

    def factorise(*args: object, **kwargs: object) -> None:
        raise AssertionError("a weight was factorised")

    monkeypatch.setattr(sorsa_plugin.tuner.initialise, "factorise", factorise)


def snapshot(module: nn.Module) -> dict[str, torch.Tensor]:
    """A copy of every tensor of a module."""
    return copy.deepcopy(module.state_dict())


def assert_same_tensors(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


def trained(
    base: PreTrainedModel | None = None, adapter: str = "default", seed: int = 3, scale: float = 0.1, **options: Any
) -> PeftModel:
    """A model (the tiny Llama) with an adapter that has moved, in eval mode; modules_to_save and trained tokens have
    moved too."""
    options = {"r": 3, "target_modules": "all-linear", **options}
    model = get_peft_model(tiny_llama() if base is None else base, SORSAConfig(**options), adapter_name=adapter)
    perturb(model, adapter, scale, seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if f"modules_to_save.{adapter}" in name or "trainable_tokens_delta" in name:
                parameter.mul_(1.5)
    return model.eval()
