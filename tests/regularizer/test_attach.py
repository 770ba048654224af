"""What attach binds to an optimizer: one attachment, one gamma, and what it refuses."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from builders.adapters import perturb
from builders.one_layer import inputs, only_layer
from builders.regularized_steps import (
    GAMMA,
    LR,
    backward,
    exact_step,
    one_layer,
    regularized,
    same,
    sgd,
    step,
    trained,
    values,
)
from peft import get_peft_model
from torch import nn
from torch.optim import SGD, AdamW
from transformers.optimization import Adafactor

from sorsa_plugin import SORSAConfig, attach, gaps
from sorsa_plugin.errors import AttachError, NoAdaptedLayersError
from sorsa_plugin.layers.layer import sorsa_layers
from sorsa_plugin.regularizer.optimizers import ETA_MAX

ATTACHED = "attached itself"


# -- what a step does -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("update", ["coupled", "decoupled"])
def test_gamma_argument_overrides_the_adapters(update: str) -> None:
    model = one_layer(reg_update=update)
    optimizer = sgd(model)
    expected = exact_step(model, gamma=0.3, update=update)
    attach(model, optimizer, gamma=0.3)
    step(model, optimizer)
    torch.testing.assert_close(only_layer(model).get_factors()[0].detach(), expected["U"], rtol=0, atol=1e-14)


def test_second_attach_returns_the_first_and_changes_only_a_given_gamma() -> None:
    model = one_layer()
    optimizer = sgd(model)
    first = attach(model, optimizer, gamma=0.2)
    assert attach(model, optimizer) is first
    assert first.settings().gamma == 0.2
    assert attach(model, optimizer, gamma=0.3) is first
    assert first.settings().gamma == 0.3
    expected = exact_step(model, gamma=0.3, update="coupled")
    step(model, optimizer)
    assert first.steps == 1, "a second attach must not act twice"
    torch.testing.assert_close(only_layer(model).get_factors()[0].detach(), expected["U"], rtol=0, atol=1e-14)


def test_detached_optimizer_trains_without_the_regularizer_until_attached_again(log: Callable) -> None:
    model = one_layer()
    optimizer = sgd(model)
    first = attach(model, optimizer)
    first.detach()
    expected = exact_step(model, gamma=0.0, update="coupled")

    step(model, optimizer)

    assert not log(ATTACHED)
    assert first.steps == 0
    torch.testing.assert_close(only_layer(model).get_factors()[0].detach(), expected["U"], rtol=0, atol=1e-14)
    expected = exact_step(model, gamma=GAMMA, update="coupled")
    again = attach(model, optimizer)
    step(model, optimizer)
    assert again.steps == 1
    torch.testing.assert_close(only_layer(model).get_factors()[0].detach(), expected["U"], rtol=0, atol=1e-14)


# -- learning rates ---------------------------------------------------------------------------------------------------


def test_adapter_added_to_the_optimizer_after_attach_is_regularized_at_its_own_peak() -> None:
    model = one_layer(torch.float32, gamma=0.0)
    optimizer = sgd(model)
    attachment = attach(model, optimizer)
    model.add_adapter("late", SORSAConfig(r=2, target_modules=["proj"], gamma=GAMMA))
    model.set_adapter("late")
    perturb(model, "late", scale=0.3)
    optimizer.add_param_group({"params": trained(model), "lr": LR / 2})
    before = gaps(model)
    for _ in range(3):
        step(model, optimizer)
    assert attachment.steps == 3
    assert optimizer.param_groups[1][ETA_MAX] == LR / 2
    after = gaps(model)
    assert all(after[name] < 0.9 * before[name] for name in before)


# -- attaching by itself ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("update", ["coupled", "decoupled"])
def test_gamma_zero_is_plain_training(update: str) -> None:
    results = []
    for detached in (False, True):
        model = one_layer(gamma=0.0, reg_update=update)
        optimizer = AdamW(trained(model), lr=LR, weight_decay=0.0)
        if detached:
            attach(model, optimizer).detach()
        for _ in range(3):
            step(model, optimizer)
        results.append(values(model))
    assert same(*results)


@pytest.mark.parametrize("update", ["coupled", "decoupled"])
def test_gamma_zero_permits_what_the_regularizer_does_not(update: str) -> None:
    model = one_layer(gamma=0.0, reg_update=update)
    step(model, sgd(model, lr=0.0))
    optimizer = torch.optim.LBFGS(trained(model), lr=LR, max_iter=2)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = model(inputs(24, dtype=torch.float64)).square().mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    assert attach(model, optimizer).metrics(optimizer)["sorsa/reg_loss"] == 0.0


@pytest.mark.parametrize("explicit", [True, False], ids=["attach", "by-itself"])
def test_two_optimizers_that_share_the_factors_act_as_one(explicit: bool, log: Callable) -> None:
    together, apart = one_layer(), one_layer()
    step(together, sgd(together))
    factors = only_layer(apart).factors("default")
    pair = [SGD([factors.dU, factors.dS], lr=LR), SGD([factors.dV], lr=LR)]
    if explicit:
        for optimizer in pair:
            attach(apart, optimizer)
    backward(apart)
    for optimizer in pair:
        optimizer.step()
    assert same(values(together), values(apart))
    assert len(log(ATTACHED)) == (1 if explicit else 3)


def test_adapters_with_other_options_may_train_with_optimizers_of_their_own(log: Callable) -> None:
    model = get_peft_model(
        nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), SORSAConfig(r=2, target_modules=["0"], gamma=GAMMA), "first"
    )
    model.add_adapter("second", SORSAConfig(r=2, target_modules=["1"], gamma=GAMMA / 2))
    model.base_model.set_adapter(["first", "second"])
    for name in ("first", "second"):
        perturb(model, name, scale=0.3)
    moved = regularized(model, [sgd(layer) for layer in sorsa_layers(model)])
    assert all(value.any() for name, value in moved.items() if not name.endswith("dS"))
    for gamma, said in zip((GAMMA, GAMMA / 2), log(ATTACHED), strict=True):
        assert f"gamma {gamma:g}," in said


# -- what is refused, and advice --------------------------------------------------------------------------------------


@pytest.mark.parametrize("second", [{"gamma": 0.2}, {"gamma": GAMMA, "reg_update": "decoupled"}])
def test_adapters_that_ask_for_different_regularizers_are_an_error_while_active_together(second: dict) -> None:
    model = one_layer(torch.float32)
    model.add_adapter("other", SORSAConfig(r=2, target_modules=["proj"], **second))
    optimizer = sgd(model)
    attach(model, optimizer)
    model.base_model.set_adapter(["default", "other"])
    with pytest.raises(AttachError, match="The active adapters ask for different regularizers"):
        attach(model, sgd(model))
    backward(model)
    with pytest.raises(AttachError, match="The active adapters ask for different regularizers"):
        optimizer.step()


def test_lbfgs_is_refused_where_the_penalty_would_miss_its_line_search() -> None:
    model = one_layer()
    with pytest.raises(AttachError, match="LBFGS searches along a line"):
        attach(model, torch.optim.LBFGS(trained(model), lr=LR))
    model = one_layer(reg_update="decoupled")
    attach(model, torch.optim.LBFGS(trained(model), lr=LR))


def test_an_optimizer_without_a_learning_rate_is_an_error_unless_gamma_is_zero() -> None:
    """As Adafactor with relative_step=True."""
    for gamma in (GAMMA, 0.0):
        model = one_layer(gamma=gamma)
        optimizer = Adafactor(trained(model), relative_step=True, lr=None)
        backward(model)
        if gamma:
            with pytest.raises(AttachError, match="relative_step=False"):
                optimizer.step()
        else:
            optimizer.step()


def test_optimizer_that_owns_no_factor_is_an_error() -> None:
    model = one_layer()
    with pytest.raises(AttachError, match="SGD owns none of the model's 2 SORSA factors"):
        attach(model, SGD(nn.Linear(2, 2).parameters(), lr=LR))


def test_unknown_engine_is_an_error() -> None:
    with pytest.raises(AttachError, match="dict owns none of the model's 2 SORSA factors, and no plug-in knows"):
        attach(one_layer(), {})


def test_model_without_adapters_is_an_error() -> None:
    layer = nn.Linear(2, 2)
    with pytest.raises(NoAdaptedLayersError, match="Linear has no active, trainable SORSA adapter"):
        attach(layer, SGD(layer.parameters(), lr=LR))


def test_factors_hidden_in_a_flat_tensor_are_refused_unless_gamma_is_zero() -> None:
    def run(gamma: float) -> None:
        model = one_layer(gamma=gamma)
        offset = only_layer(model).factors("default").dU
        flat = nn.Parameter(torch.zeros(offset.numel() + 3, dtype=offset.dtype))
        offset.data = flat.data[3:].view_as(offset)
        optimizer = SGD([flat], lr=LR)
        flat.grad = torch.ones_like(flat)
        optimizer.step()

    run(0.0)
    with pytest.raises(AttachError, match=r"SGD steps proj\.default\.U as a part of a flat tensor"):
        run(GAMMA)
