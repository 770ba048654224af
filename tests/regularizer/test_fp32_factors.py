"""Offsets that something rounded are fp32 again before the first update, or an error."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from builders.one_layer import only_layer
from builders.regularized_steps import LR, one_layer, step, trained
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.optim import SGD, AdamW, Optimizer

from sorsa_plugin import attach
from sorsa_plugin.errors import AttachError


def cast_offsets(model: nn.Module, dtype: torch.dtype = torch.bfloat16) -> None:
    """What TRL does to trainable parameters on quantised bases."""
    for parameter in trained(model):
        parameter.data = parameter.data.to(dtype)


@pytest.mark.parametrize("explicit", [True, False], ids=["attach", "by-itself"])
@pytest.mark.parametrize("optimizer_class", [SGD, AdamW])
def test_rounded_offsets_are_fp32_again_before_the_first_update(
    optimizer_class: type[Optimizer], explicit: bool
) -> None:
    model = one_layer(torch.float32, gamma=0.0)
    for parameter in trained(model):
        parameter.data.fill_(1.0)
    cast_offsets(model)
    optimizer = optimizer_class(trained(model), lr=1e-5)
    if explicit:
        attach(model, optimizer)
    step(model, optimizer)
    for parameter in trained(model):
        assert parameter.dtype == torch.float32
        assert parameter.grad.dtype == torch.float32
        for entry in optimizer.state[parameter].values():
            assert not isinstance(entry, torch.Tensor) or entry.dtype == torch.float32
    dU = only_layer(model).factors("default").dU
    assert bool((dU != 1.0).any()), "an update of 1e-5 is lost in bf16"


def test_rounded_offsets_with_optimizer_state_are_an_error() -> None:
    model = one_layer(torch.float32)
    optimizer = AdamW(trained(model), lr=LR)
    attachment = attach(model, optimizer)
    step(model, optimizer)
    attachment.detach()
    cast_offsets(model)
    with pytest.raises(AttachError, match="3 SORSA offsets had been cast to 16 bits and the optimizer already holds"):
        attach(model, optimizer)


def test_rounded_offsets_that_were_sharded_are_refused(mesh: DeviceMesh, monkeypatch: pytest.MonkeyPatch) -> None:
    """FSDP2 keeps their memory and dtype itself, so that they cannot be cast back."""
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    model = one_layer(torch.float32)
    cast_offsets(model)
    fully_shard(model, mesh=mesh)
    with pytest.raises(AttachError, match="cast to 16 bits before they were sharded"):
        attach(model, SGD(trained(model), lr=LR))


def test_offsets_that_are_fp32_again_are_said_to_be(log: Callable[[str], list[str]]) -> None:
    model = one_layer(torch.float32)
    for parameter in trained(model):
        parameter.data.zero_()
    cast_offsets(model)
    attach(model, SGD(trained(model), lr=LR))
    assert log("cast to 16 bits") == ["3 SORSA offsets had been cast to 16 bits; they train in fp32."]
