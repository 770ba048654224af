"""The adapted model as a whole: what trains, deleting adapters, copies."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from builders.adapters import assert_same_tensors, perturb
from builders.llama import tiny_llama
from builders.one_layer import adapt, inputs, make_base, only_layer
from builders.references import forward_bound, paper_forward
from peft import get_peft_model
from torch import nn

from sorsa_plugin import SORSAConfig
from sorsa_plugin.files.adapter_format import OFFSETS
from sorsa_plugin.layers.layer import sorsa_layers

# -- several adapters ------------------------------------------------------------------------------------------------


def two_adapters(**second) -> tuple[nn.Module, nn.Module]:
    """A layer with adapters "default" of rank 4 and "second" (rank 2 unless told), both exact."""
    model = adapt(make_base(shape=(40, 16)), r=4, svd="exact")
    model.add_adapter("second", SORSAConfig(**{"r": 2, "target_modules": ["proj"], "svd": "exact", **second}))
    return model, only_layer(model)


def test_only_the_active_adapter_counts():
    model, layer = two_adapters()
    perturb(model, seed=1)
    perturb(model, "second", seed=2)
    x = inputs(16)
    outputs = {}
    for name in ("default", "second"):
        model.set_adapter(name)
        assert list(layer.trained()) == [name]
        outputs[name] = model(x).detach()
        assert (
            (outputs[name].double() - paper_forward(layer, x, name)).abs() <= forward_bound(layer, x, (name,))
        ).all()
    assert not torch.equal(outputs["default"], outputs["second"])


def test_deleting_an_adapter_leaves_nothing_of_it():
    model, layer = two_adapters(sorsa_dropout=0.5)
    perturb(model, seed=1)
    x = inputs(16)
    expected = model(x)
    model.delete_adapter("second")
    assert not [key for key in model.state_dict() if "second" in key]
    assert not [name for name, _ in model.named_modules() if "second" in name]
    assert "second" not in layer.configs
    assert "second" not in model.peft_config
    assert torch.equal(model(x), expected)
    with pytest.raises(ValueError, match="no SORSA adapter named 'second'"):
        layer.get_factors("second")


def test_deleting_the_only_adapter_gives_the_base_model_back():
    base, x = make_base(), inputs(24)
    expected = base(x)
    model = adapt(base)
    perturb(model)
    model.delete_adapter("default")
    assert torch.equal(model.base_model.model(x), expected)  # PeftModel.forward itself wants an active adapter
    assert not [key for key in model.state_dict() if "sorsa" in key]


# -- options ---------------------------------------------------------------------------------------------------------


def test_modules_to_save_train_in_full_beside_the_adapter(tokens, tmp_path):
    model = get_peft_model(tiny_llama(), SORSAConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"]))
    model(tokens, labels=tokens).loss.backward()
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == 3 * 2 + 1
    head = next(name for name in trained if "lm_head" in name)
    assert model.get_parameter(head).grad.norm() > 0


def test_exactly_the_offsets_train():
    model = get_peft_model(tiny_llama(), SORSAConfig(r=2, target_modules="all-linear"))
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == 14 * 3
    assert {name.rsplit(".", 1)[1] for name in trained} == set(OFFSETS)
    assert all(".sorsa_factors.default." in name for name in trained)  # what TRL replaces to copy an adapter
    count = sum(2 * (layer.out_features + layer.in_features) + 2 for layer in sorsa_layers(model))
    assert model.get_nb_trainable_parameters()[0] == count


# -- copies ----------------------------------------------------------------------------------------------------------


def through_torch_save(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, through_torch_save], ids=["deepcopy", "torch.save"])
def test_a_copied_model_computes_the_same_and_is_independent(duplicate, llama, tokens):
    model = get_peft_model(llama, SORSAConfig(r=3, target_modules="all-linear"))
    perturb(model)
    expected = model(tokens).logits
    twin = duplicate(model)
    assert torch.equal(twin(tokens).logits, expected)
    assert_same_tensors(twin.state_dict(), model.state_dict())
    perturb(twin, seed=9)
    assert torch.equal(model(tokens).logits, expected)
    assert not torch.equal(twin(tokens).logits, expected)
    twin(tokens, labels=tokens).loss.backward()
    assert all(p.grad is not None for p in twin.parameters() if p.requires_grad)
    assert all(p.grad is None for p in model.parameters())


def test_a_copied_model_is_regularized_when_its_own_optimizer_steps(tokens):
    model = copy.deepcopy(get_peft_model(tiny_llama(), SORSAConfig(r=3, target_modules=["q_proj"], gamma=0.5)))
    perturb(model)
    factors = sorsa_layers(model)[0].factors("default")
    before = factors.dU.detach().clone()
    model(tokens, labels=tokens).loss.backward()
    task_gradient = factors.dU.grad.clone()
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3).step()
    assert not torch.equal(factors.dU.detach(), before - 1e-3 * task_gradient)
