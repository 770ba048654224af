"""Parameters that FSDP2 shards, in one process, beside and under the regularizer; several are in `distributed/`."""

from __future__ import annotations

import torch
from support import adapt, inputs, make_base
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.optim import SGD

from sorsa_plugin.layer import live_layers


def test_the_optimizer_of_another_model_that_is_sharded_is_left_alone(mesh: DeviceMesh) -> None:
    model = adapt(make_base())
    critic = fully_shard(nn.Linear(24, 1), mesh=mesh)
    optimizer = SGD(critic.parameters(), lr=0.1)
    before = critic.bias.full_tensor().detach().clone()
    critic(inputs(24)).sum().backward()
    optimizer.step()
    assert not torch.equal(critic.bias.full_tensor(), before)
    assert model.proj in live_layers, "whose factors the step looked for"
