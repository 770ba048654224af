"""A base model that tensor parallelism or FSDP2 already split: refused with a sentence where it is adapted."""

from __future__ import annotations

import pytest
from builders.llama import tiny_llama
from peft import get_peft_model
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

from sorsa_plugin import SORSAConfig
from sorsa_plugin.errors import UnsupportedLayerError


def test_a_tensor_parallel_weight_is_refused_by_its_name(mesh: DeviceMesh) -> None:
    model = parallelize_module(tiny_llama(), mesh, {"model.layers.*.mlp.up_proj": ColwiseParallel()})
    with pytest.raises(UnsupportedLayerError, match=r"mlp\.up_proj\.weight is a DTensor placed as \(Shard\(dim=0\),\)"):
        get_peft_model(model, SORSAConfig(r=2, target_modules=["up_proj"]))


def test_layers_outside_the_plan_are_adapted(mesh: DeviceMesh) -> None:
    model = parallelize_module(tiny_llama(), mesh, {"model.layers.*.mlp.up_proj": ColwiseParallel()})
    adapted = get_peft_model(model, SORSAConfig(r=2, target_modules=["q_proj"]))
    assert any("q_proj.sorsa_factors" in name for name, _ in adapted.named_parameters())


def test_a_model_that_fsdp2_sharded_before_it_is_adapted_is_refused(mesh: DeviceMesh) -> None:
    with pytest.raises(UnsupportedLayerError, match=r"For FSDP2 call get_peft_model\(\) first"):
        get_peft_model(fully_shard(tiny_llama(), mesh=mesh), SORSAConfig(r=2, target_modules=["q_proj"]))
