"""Which modules are adapted, by which layer, and which are refused by name."""

from __future__ import annotations

import warnings

import pytest
import torch
from builders.llama import tiny_llama
from builders.one_layer import (
    KINDS,
    OneLayer,
    adapt,
    inputs,
    make_base,
    only_layer,
)
from peft import get_peft_model
from torch import nn
from transformers import MambaConfig, MambaForCausalLM
from transformers.pytorch_utils import Conv1D

from sorsa_plugin import SORSAConfig
from sorsa_plugin.errors import UnsupportedLayerError
from sorsa_plugin.layers.layer import sorsa_layers

# -- options ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "declared"), [("conv1d", False), ("linear", True)])
def test_a_wrong_fan_in_fan_out_is_corrected_with_a_warning(kind, declared):
    base, x = make_base(kind, (40, 16)), inputs(16)
    expected = base(x)
    config = SORSAConfig(r=4, target_modules=["proj"], fan_in_fan_out=declared)
    with pytest.warns(UserWarning, match=f"fan_in_fan_out is set to {declared} .*Setting fan_in_fan_out to"):
        model = get_peft_model(base, config)
    assert model.peft_config["default"].fan_in_fan_out is not declared
    assert torch.equal(model(x), expected)
    layer = only_layer(model)
    assert (layer.out_features, layer.in_features) == (40, 16)


@pytest.mark.parametrize("kind", KINDS)
def test_a_right_fan_in_fan_out_does_not_warn(kind):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        adapt(make_base(kind))


@pytest.mark.parametrize(
    "module", [nn.ConvTranspose2d(3, 4, 3), nn.EmbeddingBag(8, 4), nn.LayerNorm(4)], ids=lambda m: type(m).__name__
)
def test_an_unsupported_module_is_an_error_that_names_it_its_type_and_the_way_out(module):
    message = rf"Target module proj of type {type(module).__name__} is not supported .*exclude_modules"
    with pytest.raises(UnsupportedLayerError, match=message) as caught:
        adapt(OneLayer(module))
    assert isinstance(caught.value, TypeError)


def test_subclasses_of_the_known_kinds_are_adapted():
    class Mine(nn.Linear):
        pass

    class MineToo(Conv1D):
        pass

    for module, kind in ((Mine(6, 8), "SORSALinear"), (MineToo(8, 6), "SORSAConv1DLinear")):
        layer = only_layer(adapt(OneLayer(module), r=2))
        assert type(layer).__name__ == kind
        assert (layer.out_features, layer.in_features) == (8, 6)


def adapted_names(**options) -> set[str]:
    return {layer.name for layer in sorsa_layers(get_peft_model(tiny_llama(), SORSAConfig(r=2, **options)))}


def test_all_linear_is_every_projection_but_the_head():
    names = adapted_names(target_modules="all-linear")
    kinds = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    assert {name.split(".")[-1] for name in names} == set(kinds)
    assert len(names) == 14


def test_the_default_targets_are_pefts_for_the_architecture():
    assert {name.split(".")[-1] for name in adapted_names()} == {"q_proj", "v_proj"}


def test_excluded_modules_are_left_alone():
    names = adapted_names(target_modules="all-linear", exclude_modules=["q_proj", "layers.1.mlp.up_proj"])
    assert len(names) == 14 - 3
    assert not [name for name in names if name.endswith("q_proj")]


def test_layers_to_transform_selects_layers():
    assert adapted_names(target_modules=["q_proj"], layers_to_transform=[1]) == {"model.layers.1.self_attn.q_proj"}


def test_targets_that_match_nothing_are_an_error():
    with pytest.raises(ValueError, match="nothing_like_this"):
        adapted_names(target_modules=["nothing_like_this"])


# -- copies ----------------------------------------------------------------------------------------------------------


def test_modules_that_mambas_kernels_read_are_refused_as_for_lora():
    model = MambaForCausalLM(MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=1, state_size=4))
    with pytest.raises(ValueError, match="Module 'out_proj' is incompatible with Mamba-based models"):
        get_peft_model(model, SORSAConfig(r=2, target_modules=["out_proj"]))
    get_peft_model(model, SORSAConfig(r=2, target_modules=["in_proj"]))


@pytest.mark.parametrize(
    "computed",
    [nn.utils.parametrizations.weight_norm, nn.utils.parametrizations.spectral_norm, nn.utils.spectral_norm],
)
def test_a_weight_computed_from_others_is_refused_with_a_way_out(computed):
    base = nn.Sequential(computed(nn.Linear(6, 5)))
    with pytest.raises(UnsupportedLayerError, match="computed from other parameters") as error:
        get_peft_model(base, SORSAConfig(r=2, target_modules=["0"]))
    assert "remove_parametrizations" in str(error.value)
