"""What this package has to know about torch optimizers: peak rates, wrappers, steps within steps; knows no factor."""

from __future__ import annotations

import sys
from typing import Any

from torch.optim.optimizer import Optimizer

STEP = Optimizer.profile_hook_step(lambda *args: None).__code__
"""The code of torch's wrapper around every optimizer class's `step`, which calls the hooks."""

ETA_MAX = "sorsa_eta_max"
"""Key of a parameter group: the peak learning rate, read once at attach, saved and resumed with the optimizer. Zero
until it is read."""


def peak_rate(group: dict[str, Any]) -> float:
    """The group's peak learning rate, read once: after a resume the schedule's start cannot be seen any more.

    0 for a group that rests: its rate was never above zero.
    """
    if not group.get(ETA_MAX):
        group[ETA_MAX] = planned_rate(group)
    return group[ETA_MAX]


def planned_rate(group: dict[str, Any]) -> float:
    """The highest learning rate that the group's keys announce: a scheduler notes where it begins or peaks."""
    return float(group.get("max_lr") or group.get("initial_lr") or group["lr"] or 0.0)


def innermost(optimizer: Any) -> Any:
    """The end of a chain of `.optimizer` attributes (accelerate's wrapper, DeepSpeed's), or the optimizer itself."""
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer


def only_makes_state(optimizer: Optimizer, kwargs: dict[str, Any]) -> bool:
    """Whether the call `step(**kwargs)` that begins is torch.distributed.checkpoint's, and no step of a training run.

    That module steps a fresh optimizer at rate zero, so that the optimizer has state to load into or to save. The call
    is recognised by facts that are the same on all processes: no state, every rate zero, and `closure=None`, which
    training loops without a closure do not pass.
    """
    named = "closure" in kwargs and kwargs["closure"] is None
    return named and not optimizer.state and all(group.get("lr", 1.0) == 0 for group in optimizer.param_groups)


def groups_by_parameter(optimizer: Optimizer | None) -> dict[int, dict[str, Any]]:
    """{id of a parameter: its parameter group}; empty without an optimizer."""
    groups = optimizer.param_groups if optimizer is not None else []
    return {id(parameter): group for group in groups for parameter in group["params"]}


def enclosing_steps(optimizer: Optimizer) -> list[Optimizer]:
    """The optimizers whose running `step` called this one's `step` and that share parameters with it, innermost first.

    Contains the optimizer itself if its class's `step` called that of the class above. Call this in a hook of a step.

    Subclasses call `super().step()`; SAM, Lookahead and several optimizers in one call each other's. Torch runs hooks
    for each of them. Which hooks it runs depends on what else the process has made: torch puts hooks on a class when
    the first instance of just that class is made.

    This function walks the call stack, so that a step that raised leaves nothing behind. Torch has no hook for the end
    of such a step, and a flag set at its beginning would stay set.
    """
    stepping, frame = [], sys._getframe(1)
    while frame is not None:
        if frame.f_code is STEP:
            stepping.append(frame.f_locals["args"][0])
        frame = frame.f_back  # type: ignore[assignment]
    outer = stepping[1:]  # without the step that this hook belongs to
    mine = groups_by_parameter(optimizer) if outer else {}
    return [other for other in outer if not mine.keys().isdisjoint(groups_by_parameter(other))]
