"""Parameters that FSDP2 shards, in one process, beside and under the regularizer; several are in `distributed/`."""

from __future__ import annotations

import pytest
import torch
from builders.one_layer import adapt, inputs, make_base
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.optim import SGD

from sorsa_plugin import attach
from sorsa_plugin.layers.layer import live_layers


def test_the_optimizer_of_another_model_that_is_sharded_is_left_alone(mesh: DeviceMesh) -> None:
    model = adapt(make_base())
    critic = fully_shard(nn.Linear(24, 1), mesh=mesh)
    optimizer = SGD(critic.parameters(), lr=0.1)
    before = critic.bias.full_tensor().detach().clone()
    critic(inputs(24)).sum().backward()
    optimizer.step()
    assert not torch.equal(critic.bias.full_tensor(), before)
    assert model.proj in live_layers(), "whose factors the step looked for"


def test_factors_that_are_sharded_between_attach_and_the_first_step_are_found(
    mesh: DeviceMesh, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`accelerator.prepare` gives the optimizer the sharded parameters in the place of the whole ones."""
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    model = adapt(make_base())
    whole = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = SGD(whole.values(), lr=0.1)
    attachment = attach(model, optimizer)
    fully_shard(model, mesh=mesh)
    optimizer.param_groups[0]["params"] = [dict(model.named_parameters())[name] for name in whole]

    model(inputs(24)).square().mean().backward()
    optimizer.step()

    assert type(attachment.engine).__name__ == "FSDP2"
    assert attachment.steps == 1
