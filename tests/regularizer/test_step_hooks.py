"""One optimizer step in a plain torch loop: what the regularizer adds to it, and where."""

from __future__ import annotations

import pytest
import torch
from builders.llama import tiny_llama
from builders.one_layer import adapt, inputs, make_base, only_layer
from builders.regularized_steps import (
    GAMMA,
    LR,
    backward,
    exact_step,
    one_layer,
    same,
    sgd,
    step,
    trained,
    values,
)
from peft import get_peft_model
from torch import nn
from torch.optim import SGD, AdamW, Optimizer

from sorsa_plugin import SORSAConfig, attach, gaps
from sorsa_plugin.errors import NonFiniteGradientError
from sorsa_plugin.layers.layer import sorsa_layers

# -- what a step does -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("explicit", [True, False], ids=["attach", "by-itself"])
@pytest.mark.parametrize("update", ["coupled", "decoupled"])
def test_one_step_is_the_formula(update: str, explicit: bool) -> None:
    """One step in float64: a few dozen roundings of values below 4, so 1e-14; the regularizer moves far more."""
    model = one_layer(reg_update=update)
    optimizer = sgd(model)
    expected = exact_step(model, gamma=GAMMA, update=update)
    without = exact_step(model, gamma=0.0, update=update)
    if explicit:
        attach(model, optimizer)

    step(model, optimizer)

    for part, found in zip("USV", only_layer(model).get_factors(), strict=True):
        torch.testing.assert_close(found.detach(), expected[part], rtol=0, atol=1e-14)
        if part != "S":
            assert float((expected[part] - without[part]).abs().max()) > 1e-4


def test_step_from_orthonormal_factors_is_no_larger_than_eps_promises() -> None:
    """gamma 2/F (gap / eps) sigma_max(P) per factor, with eps = 1e-5 sqrt(r): far below the published gamma 2/F."""
    model = adapt(make_base(), gamma=GAMMA)
    optimizer = sgd(model)
    attach(model, optimizer)
    before = gaps(model)
    for parameter in trained(model):
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    factors = only_layer(model).factors("default")
    for part in "UV":
        promised = GAMMA * before[f"proj.default.{part}"] / (1e-5 * factors.rank**0.5)
        moved = float(factors.get_parameter(f"d{part}").detach().norm())
        assert 0 < moved <= promised * 1.001
        assert promised < 0.5 * GAMMA


def test_factor_without_gradient_stays_and_still_counts() -> None:
    model = one_layer()
    optimizer = sgd(model)
    expected = exact_step(model, gamma=GAMMA, update="coupled")
    before = values(model)
    attach(model, optimizer)
    backward(model)
    factors = only_layer(model).factors("default")
    factors.dV.grad = None
    optimizer.step()
    assert torch.equal(factors.dV, before[next(name for name in before if name.endswith("dV"))])
    torch.testing.assert_close(only_layer(model).get_factors()[0].detach(), expected["U"], rtol=0, atol=1e-14)


@pytest.mark.parametrize("count", [1, 2, 4, 8])
def test_accumulated_gradients_meet_the_regularizer_once(count: int) -> None:
    model = one_layer()
    optimizer = sgd(model)
    attachment = attach(model, optimizer)
    expected = exact_step(model, gamma=GAMMA, update="coupled")
    for _ in range(count):
        model(inputs(24, dtype=torch.float64)).square().mean().div(count).backward()
    optimizer.step()
    assert attachment.steps == 1
    torch.testing.assert_close(only_layer(model).get_factors()[0].detach(), expected["U"], rtol=0, atol=1e-14)


def test_task_gradient_is_clipped_and_the_regularizer_is_not() -> None:
    model = one_layer()
    optimizer = sgd(model)
    attach(model, optimizer)
    zero = {name: p.detach().clone() for name, p in model.named_parameters()}
    backward(model)
    nn.utils.clip_grad_norm_(trained(model), 1e-12)
    optimizer.step()
    moved = max(float((p.detach() - zero[name]).abs().max()) for name, p in model.named_parameters())
    assert moved > 1e-4  # gamma / F times a direction of unit norm, and not lr * 1e-12


@pytest.mark.parametrize("schedule", ["lr", "constant"])
def test_decoupled_at_one_half_reaches_the_nearest_orthonormal_factors(schedule: str) -> None:
    """One Newton-Schulz step squares the gap: E' = -(3/4) E^2 - (1/4) E^3 for E = P^T P - I."""
    model = one_layer(gamma=0.5, reg_update="decoupled", reg_schedule=schedule)
    optimizer = sgd(model, lr=1e-12)
    for layer in sorsa_layers(model):
        factors = layer.factors("default")
        with torch.no_grad():
            factors.dU.mul_(0.1)
            factors.dV.mul_(0.1)
    before = gaps(model)
    step(model, optimizer)
    for name, gap in gaps(model).items():
        assert gap <= 0.75 * before[name] ** 2 + 0.25 * before[name] ** 3 + 1e-10
        assert gap < 0.1 * before[name]


# -- mixed precision --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("update", ["coupled", "decoupled"])
def test_loss_scaling_changes_nothing(update: str, fused: bool) -> None:
    """The scale is a power of two, so scaling and unscaling are exact and the two runs are bit-equal."""
    results = []
    for scale in (1.0, 1024.0):
        model = one_layer(torch.float32, reg_update=update)
        optimizer = AdamW(trained(model), lr=LR, weight_decay=0.0, fused=fused)
        attach(model, optimizer)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=1000)
        for _ in range(3):
            optimizer.zero_grad()
            scaler.scale(model(inputs(24)).square().mean()).backward()
            scaler.step(optimizer)
            scaler.update()
        results.append(values(model))
    assert same(*results)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("update", ["coupled", "decoupled"])
def test_overflowed_step_leaves_every_factor_alone(update: str, fused: bool) -> None:
    model = one_layer(torch.float32, reg_update=update)
    optimizer = AdamW(trained(model), lr=LR, weight_decay=0.0, fused=fused)
    attachment = attach(model, optimizer)
    scaler = torch.amp.GradScaler("cpu")
    before = values(model)
    scaler.scale(model(inputs(24)).square().mean()).backward()
    only_layer(model).factors("default").dS.grad[0] = float("inf")
    scaler.step(optimizer)
    scaler.update()
    assert same(before, values(model))
    if not fused:
        assert attachment.steps == 0, "the skipped step must not be visited"
    step(model, optimizer)
    assert not same(before, values(model))


# -- what is refused, and advice --------------------------------------------------------------------------------------


@pytest.mark.parametrize("reg_update", ["coupled", "decoupled"])
@pytest.mark.parametrize("optimizer_class", [SGD, AdamW])
@pytest.mark.parametrize("by_keyword", [True, False])
@pytest.mark.parametrize("attached", [True, False])
def test_a_closure_trains_as_backward_before_the_step(
    by_keyword: bool, optimizer_class: type[Optimizer], reg_update: str, attached: bool
) -> None:
    """As Lightning trains: `step(closure)`, with the gradients made inside."""
    results = []
    for with_closure in (False, True):
        model = one_layer(reg_update=reg_update)
        optimizer = optimizer_class(trained(model), lr=LR)  # type: ignore[call-arg]
        if attached:
            attach(model, optimizer)

        def closure(model: nn.Module = model, optimizer: Optimizer = optimizer) -> float:
            optimizer.zero_grad()
            backward(model)
            return 7.0

        for _ in range(3):
            if not with_closure:
                step(model, optimizer)
            else:
                assert (optimizer.step(closure=closure) if by_keyword else optimizer.step(closure)) == 7.0
        results.append(values(model))
    assert same(*results)
    assert not same(results[0], values(one_layer()))


def test_a_closure_whose_gradients_are_not_finite_is_named_and_its_step_not_taken() -> None:
    model = one_layer()
    optimizer = sgd(model)
    attach(model, optimizer)
    before = values(model)

    def closure() -> None:
        (model(inputs(24, dtype=torch.float64)) * float("nan")).sum().backward()

    with pytest.raises(NonFiniteGradientError, match="in optimizer step 1"):
        optimizer.step(closure)
    assert same(before, values(model))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("folded", [False, True])
@pytest.mark.parametrize("update", ["coupled", "decoupled"])
def test_a_training_step_waits_for_no_value_and_stays_on_its_device(
    update: str, folded: bool, dtype: torch.dtype
) -> None:
    model = get_peft_model(tiny_llama(dtype), SORSAConfig(r=4, target_modules="all-linear", reg_update=update))
    if folded:
        model.fold()
    model.to("meta").train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    attachment = attach(model, optimizer)
    attachment.watch.over = True  # its norms are read, on a GPU when the next step begins
    tokens = torch.zeros((2, 5), dtype=torch.long, device="meta")
    for _ in range(2):
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert attachment.steps == 2
    assert attachment.penalty(optimizer).is_meta
    with torch.no_grad(), model.disable_adapter():
        assert model(tokens).logits.is_meta


def test_metrics_say_once_that_the_factors_have_diverged(log) -> None:
    model = one_layer()
    optimizer = sgd(model)
    attachment = attach(model, optimizer)
    attachment.metrics(optimizer)
    assert not log("have diverged")
    only_layer(model).factors("default").dU.data.fill_(10.0)
    for _ in range(2):
        gap = attachment.metrics(optimizer)["sorsa/gap_max"]
    (said,) = log("have diverged")
    assert f"The largest gap is {gap:g}" in said
    assert f"gamma ({GAMMA:g})" in said


def test_an_optimizer_that_owns_nothing_of_a_switched_adapter_says_so_once(log) -> None:
    model = one_layer(torch.float32)
    optimizer = sgd(model)
    step(model, optimizer)
    model.add_adapter("second", SORSAConfig(r=2, target_modules=["proj"], gamma=GAMMA))
    model.set_adapter("second")
    for _ in range(2):
        step(model, optimizer)
    (said,) = log("owns none of the")
    assert said.startswith("SGD owns none of the 2 SORSA factors that train now")
    optimizer = sgd(model)
    step(model, optimizer)
    assert len(log("owns none of the")) == 1
