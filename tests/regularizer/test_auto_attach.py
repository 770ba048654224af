"""An optimizer that nobody attached is attached at its first step, and follows the layers that it trains."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable

import pytest
import torch
from builders.adapters import perturb
from builders.llama import tiny_llama
from builders.one_layer import inputs, only_layer
from builders.regularized_steps import GAMMA, LR, one_layer, regularized, same, sgd, step, trained, values
from peft import PeftModel, get_peft_model, inject_adapter_in_model
from torch import nn
from torch.optim import SGD, AdamW, Optimizer

from sorsa_plugin import SORSAConfig, attach, gaps, hookimpl
from sorsa_plugin.errors import AttachError
from sorsa_plugin.files.adapter_format import OFFSETS
from sorsa_plugin.layers.layer import sorsa_layers
from sorsa_plugin.plugins import manager
from sorsa_plugin.regularizer.optimizers import ETA_MAX

ATTACHED = "attached itself"


# -- learning rates ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("explicit", [True, False], ids=["attach", "by-itself"])
def test_an_optimizer_that_nobody_needs_is_forgotten_with_its_state_and_layers(explicit: bool) -> None:
    model = one_layer()
    optimizer = AdamW(trained(model), lr=LR)
    if explicit:
        attach(model, optimizer)
    step(model, optimizer)
    gone = [weakref.ref(thing) for thing in (optimizer, only_layer(model), only_layer(model).factors("default").dU)]
    del model, optimizer
    gc.collect()
    assert [reference() for reference in gone] == [None, None, None]


# -- attaching by itself ----------------------------------------------------------------------------------------------


def test_first_step_attaches_and_says_so_once(log: Callable) -> None:
    model = one_layer()
    optimizer = sgd(model)
    for _ in range(3):
        step(model, optimizer)
    assert log(ATTACHED) == [
        "SORSA's orthonormal regularizer attached itself to SGD at its first step: gamma 0.1, coupled, 2 factors."
    ]
    assert attach(model, optimizer).steps == 3


def test_explicit_attach_does_not_announce_itself(log: Callable) -> None:
    model = one_layer()
    optimizer = sgd(model)
    attach(model, optimizer)
    step(model, optimizer)
    assert not log(ATTACHED)


def test_optimizer_without_factors_is_left_alone(log: Callable) -> None:
    model = one_layer()
    other = nn.Linear(24, 3)
    optimizer = SGD(other.parameters(), lr=LR)
    before = values(model)
    other(inputs(24)).sum().backward()
    optimizer.step()
    assert not log(ATTACHED)
    assert ETA_MAX not in optimizer.param_groups[0]
    assert same(before, values(model))


def two_layers() -> PeftModel:
    """A model of two adapted linear layers with perturbed factors."""
    model = get_peft_model(
        nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), SORSAConfig(r=2, target_modules=["0", "1"], gamma=GAMMA)
    )
    perturb(model, scale=0.3)
    return model


class RefusingEngine:
    """A plug-in whose engine knows where the factors are and cannot serve them."""

    @hookimpl(tryfirst=True)
    def sorsa_engine(self, factors: list, optimizer: Optimizer | None) -> None:
        raise AttachError("this stage is not supported")


def test_what_an_engine_cannot_serve_may_train_without_the_regularizer_alone() -> None:
    plugin = RefusingEngine()
    manager().register(plugin, "refusing")
    try:
        plain = one_layer(gamma=0.0)
        before = values(plain)
        step(plain, sgd(plain))
        assert not same(before, values(plain))
        regularized_model = one_layer()
        with pytest.raises(AttachError, match="not supported"):
            step(regularized_model, sgd(regularized_model))
    finally:
        manager().unregister(plugin)


def test_optimizers_of_a_part_of_the_layers_each_count_all_factors() -> None:
    model = two_layers()
    other = copy.deepcopy(model)
    expected = regularized(other, [sgd(other)])
    found = regularized(model, [SGD([parameter], lr=LR) for parameter in trained(model)])
    assert same(expected, found)
    assert max(float(value.abs().max()) for value in expected.values()) > 1e-3


def test_layers_that_train_after_the_first_step_are_regularized_from_then_on() -> None:
    model = two_layers()
    first, _ = sorsa_layers(model)
    first.set_requires_grad("default", False)
    optimizer = sgd(model)
    regularized(model, [optimizer])

    first.set_requires_grad("default", True)
    optimizer.add_param_group({"params": trained(first)})

    moved = regularized(model, [optimizer])
    assert all(value.any() for name, value in moved.items() if not name.endswith("dS"))


def begun(explicit: bool) -> tuple[PeftModel, Optimizer]:
    """Two layers, and an optimizer that has stepped them once."""
    model = two_layers()
    optimizer = sgd(model)
    if explicit:
        attach(model, optimizer)
    regularized(model, [optimizer])
    return model, optimizer


def as_a_fresh_optimizer_would(model: nn.Module, optimizer: Optimizer) -> bool:
    other = copy.deepcopy(model)
    expected = regularized(other, [sgd(other)])
    assert max(float(value.abs().max()) for value in expected.values()) > 1e-3
    return same(expected, regularized(model, [optimizer]))


@pytest.mark.parametrize("explicit", [True, False])
def test_an_adapter_begun_anew_for_the_same_optimizer_is_regularized_and_the_old_one_forgotten(explicit: bool) -> None:
    """As ReLoRA merges one and begins another."""
    model, optimizer = begun(explicit)
    base = model.unload()
    del model
    gc.collect()
    again = get_peft_model(base, SORSAConfig(r=2, target_modules=["0", "1"], gamma=GAMMA))
    perturb(again, scale=0.3)
    optimizer.param_groups[0]["params"] = trained(again)
    assert as_a_fresh_optimizer_would(again, optimizer)


@pytest.mark.parametrize("explicit", [True, False])
def test_layers_adapted_after_the_first_step_are_regularized_once_the_optimizer_has_them(explicit: bool) -> None:
    model, optimizer = begun(explicit)
    both = nn.ModuleList([model, two_layers()])
    regularized(model, [optimizer])  # a step that has nothing of it yet
    optimizer.add_param_group({"params": trained(both[1])})
    assert as_a_fresh_optimizer_would(both, optimizer)


def test_an_adapter_on_other_layers_is_regularized_when_its_turn_comes() -> None:
    base = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    model = get_peft_model(base, SORSAConfig(r=2, target_modules=["0"], gamma=GAMMA))
    model.add_adapter("other", SORSAConfig(r=2, target_modules=["1"], gamma=GAMMA))
    for adapter in ("default", "other"):
        perturb(model, adapter, scale=0.3)
    optimizer = SGD([p for name, p in model.named_parameters() if name.rpartition(".")[2] in OFFSETS], lr=LR)
    regularized(model, [optimizer])
    model.set_adapter("other")
    assert as_a_fresh_optimizer_would(model, optimizer)


def by_peft(config: SORSAConfig) -> nn.Module:
    return get_peft_model(tiny_llama(layers=1), config)


def by_injection(config: SORSAConfig) -> nn.Module:
    return inject_adapter_in_model(config, tiny_llama(layers=1))


def by_transformers(config: SORSAConfig) -> nn.Module:
    model = tiny_llama(layers=1)
    model.add_adapter(config)
    return model


@pytest.mark.parametrize("build", [by_peft, by_injection, by_transformers])
def test_every_way_of_adding_the_adapter_is_regularized(build: Callable, tokens: torch.Tensor, log: Callable) -> None:
    found = []
    for gamma in (0.0, GAMMA):
        model = build(SORSAConfig(r=4, target_modules=["q_proj", "down_proj"], gamma=gamma))
        perturb(model, scale=0.3)
        optimizer = sgd(model)
        for _ in range(3):
            optimizer.zero_grad()
            model(input_ids=tokens, labels=tokens).loss.backward()
            optimizer.step()
        found.append(gaps(model))
    assert len(log(ATTACHED)) == 2
    assert "4 factors" in log(ATTACHED)[0]
    assert all(found[1][name] < found[0][name] for name in found[0])


def test_eval_loss_does_not_see_gamma(tokens: torch.Tensor) -> None:
    losses = []
    for gamma in (0.0, 100.0):
        model = by_peft(SORSAConfig(r=4, target_modules="all-linear", gamma=gamma))
        perturb(model, scale=0.3)
        losses.append(model(input_ids=tokens, labels=tokens).loss)
    assert torch.equal(*losses)
