"""The peak rate and the learning rates of an optimizer, through schedulers and checkpoints."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from builders.one_layer import only_layer
from builders.regularized_steps import GAMMA, LR, exact_step, one_layer, same, sgd, step, trained, values
from peft.optimizers import create_loraplus_optimizer
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict, set_optimizer_state_dict
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import ConstantLR, CosineAnnealingLR, LambdaLR, OneCycleLR, ReduceLROnPlateau

from sorsa_plugin import attach, gaps
from sorsa_plugin.errors import AttachError
from sorsa_plugin.regularizer.optimizers import ETA_MAX

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


# -- what is refused, and advice --------------------------------------------------------------------------------------


@pytest.mark.parametrize("explicit", [True, False], ids=["attach", "by-itself"])
def test_peak_rate_of_zero_is_an_error(explicit: bool) -> None:
    model = one_layer()
    optimizer = sgd(model, lr=0.0)
    with pytest.raises(
        AttachError, match=r"peak learning rate .* is 0.0; expected a positive one.*requires_grad=False"
    ):
        attach(model, optimizer) if explicit else step(model, optimizer)


def with_v_apart(model: torch.nn.Module, lr: float) -> SGD:
    factors = only_layer(model).factors("default")
    groups = [{"params": [factors.dU, factors.dS]}, {"params": [factors.dV], "lr": lr}]
    return SGD(groups, lr=LR)


@pytest.mark.parametrize("explicit", [True, False], ids=["attach", "by-itself"])
@pytest.mark.parametrize("options", [{}, {"reg_update": "decoupled", "reg_schedule": "constant"}], ids=str)
def test_a_group_at_rate_zero_rests_beside_others_that_are_regularized(
    options: dict, explicit: bool, log: Callable
) -> None:
    model = one_layer(**options)
    optimizer, before = with_v_apart(model, lr=0.0), values(model)
    if explicit:
        attach(model, optimizer)
    expected = exact_step(model, gamma=GAMMA, update=options.get("reg_update", "coupled"))
    step(model, optimizer)
    U, S, _ = only_layer(model).get_factors()
    torch.testing.assert_close(U.detach(), expected["U"], rtol=0, atol=1e-14)
    torch.testing.assert_close(S.detach(), expected["S"], rtol=0, atol=1e-14)
    moved = {name.rsplit(".", 1)[1] for name, value in values(model).items() if not torch.equal(value, before[name])}
    assert moved == {"dU", "dS"}
    (said,) = log("have the learning rate 0")
    assert said.startswith("1 of 2 SORSA factors have the learning rate 0")
    assert attach(model, optimizer).metrics(optimizer)["sorsa/gamma"] == pytest.approx(GAMMA, rel=1e-12)


def test_a_group_that_leaves_rate_zero_by_hand_is_regularized_from_then_on() -> None:
    model = one_layer(reg_update="decoupled")
    optimizer = with_v_apart(model, lr=0.0)
    attach(model, optimizer)
    step(model, optimizer)
    optimizer.param_groups[1]["lr"] = LR
    expected = exact_step(model, gamma=GAMMA, update="decoupled")
    step(model, optimizer)
    torch.testing.assert_close(only_layer(model).get_factors()[2].detach(), expected["V"], rtol=0, atol=1e-14)


@pytest.mark.parametrize(("ratio", "lines"), [(16.0, 1), (1.0, 0)])
def test_lora_plus_on_sorsa_is_said_to_favour_s(ratio: float, lines: int, log: Callable) -> None:
    """It takes S for LoRA's B, because both of its rules miss: no name is "lora_B", and S has one dimension."""
    model = one_layer(torch.float32)
    optimizer = create_loraplus_optimizer(model, SGD, lr=LR, loraplus_lr_ratio=ratio)
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    factors = only_layer(model).factors("default")
    assert [rates[id(p)] for p in (factors.dU, factors.dS, factors.dV)] == [LR, LR * ratio, LR]
    attach(model, optimizer)
    assert len(log("S trains at 16 times the learning rate of U and V")) == lines


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
