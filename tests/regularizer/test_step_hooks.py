"""The regularizer in a plain torch loop: what attach delivers, when, how often, and what it refuses."""

from __future__ import annotations

import copy
import gc
import logging
import weakref
from collections.abc import Callable

import pytest
import torch
from builders.llama import tiny_llama
from builders.one_layer import adapt, inputs, make_base, only_layer, perturb
from peft import PeftModel, get_peft_model, inject_adapter_in_model
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict, set_optimizer_state_dict
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import ConstantLR, CosineAnnealingLR, LambdaLR, OneCycleLR, ReduceLROnPlateau
from transformers.optimization import Adafactor

from sorsa_plugin import SORSAConfig, attach, gaps
from sorsa_plugin.errors import AttachError, NoAdaptedLayersError, NonFiniteGradientError
from sorsa_plugin.layers.factors import OFFSETS
from sorsa_plugin.regularizer.optimizers import ETA_MAX
from sorsa_plugin.regularizer.trained_factors import sorsa_layers

LR = 1e-3
GAMMA = 0.1
ATTACHED = "attached itself"


def one_layer(dtype: torch.dtype = torch.float64, **options: object) -> PeftModel:
    """One adapted linear layer with perturbed factors; its trained parameters are dU, dS, dV."""
    options.setdefault("gamma", GAMMA)
    model = adapt(make_base(), **options).to(dtype)
    perturb(model, scale=0.3)
    return model


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def sgd(model: nn.Module, lr: float = LR) -> SGD:
    return SGD(trained(model), lr=lr)


def backward(model: nn.Module, rows: int = 5) -> None:
    dtype = only_layer(model).base_matrix().dtype
    model(inputs(24, rows, dtype)).square().mean().backward()


def step(model: nn.Module, optimizer: Optimizer) -> None:
    optimizer.zero_grad()
    backward(model)
    optimizer.step()


def values(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(first[name], second[name]) for name in first)


def exact_step(model: nn.Module, *, gamma: float, update: str, lr: float = LR) -> dict[str, torch.Tensor]:
    """U, S, V after one SGD step: the task's gradient by autograd, the regularizer's by the paper's formulas."""
    model.zero_grad()
    backward(model)
    layer = only_layer(model)
    P = dict(zip("USV", (t.detach() for t in layer.get_factors()), strict=True))
    gradients = {part: layer.factors("default").get_parameter(f"d{part}").grad.clone() for part in "USV"}
    model.zero_grad()
    eye = torch.eye(P["S"].shape[0], dtype=P["S"].dtype)
    if update == "coupled":
        leaves = {part: P[part].clone().requires_grad_() for part in "UV"}
        torch.stack([torch.linalg.matrix_norm(p.mT @ p - eye) for p in leaves.values()]).mean().backward()
        for part, leaf in leaves.items():
            gradients[part] += gamma / lr * leaf.grad
    P = {part: P[part] - lr * gradients[part] for part in "USV"}
    if update == "decoupled":
        for part in "UV":
            P[part] = P[part] - gamma * P[part] @ (P[part].mT @ P[part] - eye)
    return P


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> Callable[[str], list[str]]:
    """The lines logged by the attachment that contain a text."""
    caplog.set_level(logging.INFO, logger="sorsa_plugin")
    return lambda text: [r.getMessage() for r in caplog.records if text in r.getMessage()]


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


# -- learning rates ---------------------------------------------------------------------------------------------------

SCHEDULERS = {
    "none": lambda optimizer: ConstantLR(optimizer, factor=1.0),
    "warm-up from zero": lambda optimizer: LambdaLR(optimizer, lambda t: min(1.0, t / 3)),
    "cosine": lambda optimizer: CosineAnnealingLR(optimizer, T_max=6),
    "one-cycle": lambda optimizer: OneCycleLR(optimizer, max_lr=LR, total_steps=8),
    "plateau": lambda optimizer: ReduceLROnPlateau(optimizer, patience=0, factor=0.5),
}


@pytest.mark.parametrize("explicit", [True, False], ids=["attach", "by-itself"])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_rate_follows_every_scheduler_from_the_peak(name: str, explicit: bool) -> None:
    model = one_layer()
    optimizer = sgd(model)
    scheduler = SCHEDULERS[name](optimizer)
    if explicit:
        attach(model, optimizer)
    rates = []
    for count in range(1, 7):
        rates.append(optimizer.param_groups[0]["lr"])
        step(model, optimizer)
        attachment = attach(model, optimizer)
        assert attachment.steps == count, "a step at rate zero counts too"
        assert optimizer.param_groups[0][ETA_MAX] == LR
        assert attachment.metrics(optimizer)["sorsa/gamma"] == pytest.approx(GAMMA * rates[-1] / LR, rel=1e-12)
        scheduler.step(1.0) if name == "plateau" else scheduler.step()
    assert len(set(rates)) == 1 if name == "none" else len(set(rates)) > 1


@pytest.mark.parametrize(("schedule", "expected"), [("lr", 0.25), ("constant", 1.0)])
def test_decoupled_schedule(schedule: str, expected: float) -> None:
    model = one_layer(reg_update="decoupled", reg_schedule=schedule)
    optimizer = sgd(model)
    attachment = attach(model, optimizer)
    optimizer.param_groups[0]["lr"] = LR / 4
    reference = exact_step(model, gamma=GAMMA * expected, update="decoupled", lr=LR / 4)
    step(model, optimizer)
    assert attachment.metrics(optimizer)["sorsa/gamma"] == pytest.approx(GAMMA * expected, rel=1e-12)
    torch.testing.assert_close(only_layer(model).get_factors()[0].detach(), reference["U"], rtol=0, atol=1e-14)


def test_peak_rate_survives_a_resume() -> None:
    model = one_layer()
    optimizer = sgd(model)
    attach(model, optimizer)
    optimizer.param_groups[0]["lr"] = LR / 10
    resumed = sgd(model, lr=LR / 10)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    attach(model, resumed)
    assert resumed.param_groups[0][ETA_MAX] == LR


def test_state_saved_by_an_optimizer_without_the_regularizer_can_be_loaded_after_attach() -> None:
    model = one_layer()
    optimizer, foreign = sgd(model), sgd(model)
    attachment = attach(model, optimizer)
    optimizer.load_state_dict(foreign.state_dict())
    expected = exact_step(model, gamma=GAMMA, update="coupled")
    step(model, optimizer)
    assert attachment.metrics(optimizer)["sorsa/gap_mean"] > 0
    torch.testing.assert_close(only_layer(model).get_factors()[0].detach(), expected["U"], rtol=0, atol=1e-14)


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


@pytest.mark.parametrize("explicit", [True, False], ids=["attach", "by-itself"])
def test_a_step_that_only_makes_state_for_a_checkpoint_is_none(explicit: bool, log: Callable) -> None:
    """torch.distributed.checkpoint makes one, at rate zero, before it loads or saves a fresh optimizer."""
    model = one_layer(reg_update="decoupled", reg_schedule="constant")
    optimizer = AdamW(trained(model), lr=LR)
    attachment = attach(model, optimizer) if explicit else None
    before = values(model)

    get_optimizer_state_dict(model, optimizer)

    assert optimizer.state
    assert same(before, values(model))
    assert attachment is None or attachment.steps == 0
    step(model, optimizer)
    assert attach(model, optimizer).steps == 1
    assert optimizer.param_groups[0][ETA_MAX] == LR


@pytest.mark.parametrize("optimizer_type", [SGD, AdamW])
def test_a_first_step_at_rate_zero_with_zero_gradients_is_one(optimizer_type: type[Optimizer]) -> None:
    """As a warm-up's first step is, on a batch whose rewards are all equal."""
    model = one_layer(reg_update="decoupled", reg_schedule="constant")
    optimizer = optimizer_type(trained(model), lr=0.0)
    optimizer.param_groups[0]["initial_lr"] = LR
    attachment, before = attach(model, optimizer), gaps(model)
    for parameter in trained(model):
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    assert attachment.steps == 1
    assert all(gap < before[name] for name, gap in gaps(model).items())


def test_a_checkpoint_from_before_the_first_step_leaves_the_peak_rate_to_be_read() -> None:
    model = one_layer()
    saved = get_optimizer_state_dict(model, AdamW(trained(model), lr=LR))
    optimizer = AdamW(trained(model), lr=LR / 100)
    optimizer.param_groups[0]["initial_lr"] = LR  # a warm-up began
    attachment = attach(model, optimizer)
    set_optimizer_state_dict(model, optimizer, saved)
    assert attachment.metrics(optimizer)["sorsa/gap_mean"] > 0
    step(model, optimizer)
    assert optimizer.param_groups[0][ETA_MAX] == LR
    assert not attachment.peak_moved


@pytest.mark.parametrize("flat", [True, False], ids=["flat", "nested"])
def test_a_checkpoint_of_torch_distributed_resumes_the_peak_rate(flat: bool) -> None:
    """Of flat ones it loads the keys that the fresh optimizer has after that step."""
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    model = one_layer()
    optimizer = AdamW(trained(model), lr=LR)
    step(model, optimizer)
    optimizer.param_groups[0]["lr"] = LR / 2  # a schedule went on
    saved = get_optimizer_state_dict(model, optimizer, options=options)
    optimizer.zero_grad()  # as in a process that begins
    fresh = AdamW(trained(model), lr=LR / 2)

    set_optimizer_state_dict(model, fresh, saved, options=options)

    assert fresh.param_groups[0][ETA_MAX] == LR
    step(model, fresh)
    assert fresh.param_groups[0][ETA_MAX] == LR


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


def test_gamma_zero_permits_what_the_regularizer_does_not() -> None:
    model = one_layer(gamma=0.0)
    step(model, sgd(model, lr=0.0))
    optimizer = torch.optim.LBFGS(trained(model), lr=LR, max_iter=2)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = model(inputs(24, dtype=torch.float64)).square().mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    assert attach(model, optimizer).metrics(optimizer)["sorsa/reg_loss"] == 0.0


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


def two_layers() -> PeftModel:
    """A model of two adapted linear layers with perturbed factors."""
    model = get_peft_model(
        nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), SORSAConfig(r=2, target_modules=["0", "1"], gamma=GAMMA)
    )
    perturb(model, scale=0.3)
    return model


def regularized(model: nn.Module, optimizers: list[Optimizer]) -> dict[str, torch.Tensor]:
    """What a step without task moves."""
    before = values(model)
    for parameter in trained(model):
        parameter.grad = torch.zeros_like(parameter)
    for optimizer in optimizers:
        optimizer.step()
    return {name: value - before[name] for name, value in values(model).items()}


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


class Around(Optimizer):
    """An optimizer that steps another one on the same parameter groups, as Lookahead and SAM do."""

    def __init__(self, base: Optimizer, name: str) -> None:
        super().__init__(base.param_groups, {})
        self.param_groups = base.param_groups
        self.name = name
        setattr(self, name, base)

    def step(self, closure: Callable | None = None) -> None:  # type: ignore[override]
        getattr(self, self.name).step(closure)


@pytest.mark.parametrize("name", ["optimizer", "base_optimizer"])
@pytest.mark.parametrize("update", ["coupled", "decoupled"])
def test_an_optimizer_around_another_acts_once(update: str, name: str, log: Callable) -> None:
    alone, wrapped = one_layer(reg_update=update), one_layer(reg_update=update)
    for model, optimizer in ((alone, sgd(alone)), (wrapped, Around(sgd(wrapped), name))):
        for _ in range(3):
            step(model, optimizer)
    assert same(values(alone), values(wrapped))
    assert len(log(ATTACHED)) == 2


class Several(Optimizer):
    """Several optimizers in one, as Muon for matrices with AdamW for the rest."""

    def __init__(self, model: nn.Module) -> None:
        matrices, others = ([p for p in trained(model) if (p.ndim == 2) == two] for two in (True, False))
        self.parts = [SGD(matrices, lr=LR), SGD(others, lr=LR)]
        super().__init__([group for part in self.parts for group in part.param_groups], {})
        self.param_groups = [group for part in self.parts for group in part.param_groups]

    def step(self, closure: Callable | None = None) -> None:  # type: ignore[override]
        for part in self.parts:
            part.step()


class CallsSuper(SGD):
    """Of another class than SGD, so that torch puts hooks on both steps."""

    def step(self, closure: Callable | None = None) -> None:  # type: ignore[override]
        return super().step(closure)


@pytest.mark.parametrize("update", ["coupled", "decoupled"])
@pytest.mark.parametrize("attached", ["by itself", "outside", "inside"])
@pytest.mark.parametrize("kind", ["super", "several", "several, loaded"])
def test_a_step_within_a_step_regularizes_once(kind: str, attached: str, update: str) -> None:
    models = one_layer(reg_update=update), one_layer(reg_update=update)
    plain = sgd(models[0])
    optimizer = CallsSuper(trained(models[1]), lr=LR) if kind == "super" else Several(models[1])
    if "loaded" in kind:  # as accelerate does: the groups are new dictionaries then
        optimizer.load_state_dict(optimizer.state_dict())
    if attached != "by itself":
        attach(models[1], optimizer if attached == "outside" or kind == "super" else optimizer.parts[0])
    for _ in range(3):
        step(models[0], plain)
        step(models[1], optimizer)
    assert same(*map(values, models))


def test_a_step_that_raised_leaves_the_next_optimizer_of_its_groups_regularized() -> None:
    class Breaks(SGD):
        def step(self, closure: Callable | None = None) -> None:  # type: ignore[override]
            raise MemoryError

    models = one_layer(), one_layer()
    broken = Breaks(trained(models[0]), lr=LR)
    backward(models[0])
    with pytest.raises(MemoryError):
        broken.step()
    models[0].zero_grad()
    for model, optimizer in zip(models, (SGD(broken.param_groups), sgd(models[1])), strict=True):
        step(model, optimizer)
    assert same(*map(values, models))


def test_an_optimizer_that_knows_one_of_another_model_is_regularized_all_the_same() -> None:
    models = one_layer(), one_layer()
    other = one_layer()
    partner = sgd(other)
    attach(other, partner)
    optimizers = [sgd(model) for model in models]
    optimizers[0].partner = partner  # type: ignore[attr-defined]
    for model, optimizer in zip(models, optimizers, strict=True):
        step(model, optimizer)
    assert same(*map(values, models))


@pytest.mark.parametrize("name", ["optimizer", "base_optimizer"])
@pytest.mark.parametrize("update", ["coupled", "decoupled"])
@pytest.mark.parametrize("with_closure", [True, False])
@pytest.mark.parametrize("attached", [True, False])
def test_an_optimizer_around_an_attached_one_or_with_a_closure_acts_once(
    attached: bool, with_closure: bool, update: str, name: str
) -> None:
    models = one_layer(reg_update=update), one_layer(reg_update=update)
    for model in models:
        base = sgd(model)
        optimizer = base if model is models[0] else Around(base, name)
        if attached:
            attach(model, base)

        def closure(model: nn.Module = model, base: Optimizer = base) -> None:
            base.zero_grad()
            backward(model)

        for _ in range(2):
            if not with_closure:
                closure()
            optimizer.step(closure if with_closure else None)
    assert same(*map(values, models))


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


# -- what is refused, and advice --------------------------------------------------------------------------------------


@pytest.mark.parametrize("explicit", [True, False], ids=["attach", "by-itself"])
def test_peak_rate_of_zero_is_an_error(explicit: bool) -> None:
    model = one_layer()
    optimizer = sgd(model, lr=0.0)
    with pytest.raises(AttachError, match=r"peak learning rate .* is 0.0; expected a positive one"):
        attach(model, optimizer) if explicit else step(model, optimizer)


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


@pytest.mark.parametrize("explicit", [True, False], ids=["attach", "by-itself"])
def test_schedule_free_optimizers_take_the_coupled_update_only(explicit: bool) -> None:
    schedulefree = pytest.importorskip("schedulefree")

    def run(**options: object) -> dict[str, float]:
        model = one_layer(torch.float32, **options)
        optimizer = schedulefree.SGDScheduleFree(trained(model), lr=LR)
        optimizer.train()
        if explicit:
            attach(model, optimizer)
        for _ in range(5):
            step(model, optimizer)
        optimizer.eval()
        return gaps(model)

    with pytest.raises(AttachError, match="schedule-free optimizer keeps others"):
        run(reg_update="decoupled")
    without, regularized = run(gamma=0.0), run()
    assert all(regularized[name] < without[name] for name in without)


@pytest.mark.parametrize("explicit", [True, False], ids=["attach", "by-itself"])
@pytest.mark.parametrize(("lr", "lines"), [(1e-4, 0), (2e-4, 1)])
def test_high_learning_rate_is_advised_against_once_and_kept(
    lr: float, lines: int, explicit: bool, log: Callable
) -> None:
    model = one_layer()
    factors = only_layer(model).factors("default")
    optimizer = SGD([{"params": [p]} for p in (factors.dU, factors.dS, factors.dV)], lr=lr)
    if explicit:
        attach(model, optimizer)
        attach(model, optimizer)
    for _ in range(3):
        step(model, optimizer)
    assert len(log("published recipe uses 3e-5")) == lines
    assert [group["lr"] for group in optimizer.param_groups] == [lr] * 3
