"""Tells whether an optimizer's step is part of another's, as where a subclass calls `super().step()`, or with SAM,
Lookahead, and several optimizers in one.

Torch runs hooks for each of them, and which ones it does depends on what else the process has made: it puts hooks on a
class when the first instance of just that class is made. Asked is the stack of calls, so that a step that raised leaves
nothing behind.
"""

from __future__ import annotations

import sys

from torch.optim.optimizer import Optimizer

from .engines import groups_by_parameter

STEP = Optimizer.profile_hook_step(lambda *args: None).__code__
"""What torch puts around the `step` of every class of optimizers, to call hooks."""


def enclosing_steps(optimizer: Optimizer) -> list[Optimizer]:
    """The optimizers that share parameters with one and whose `step` called its own, from the inside to the outside;
    itself, where its class's `step` calls that of the class above. To be asked in a hook of a step."""
    stepping, frame = [], sys._getframe(1)
    while frame is not None:
        if frame.f_code is STEP:
            stepping.append(frame.f_locals["args"][0])
        frame = frame.f_back  # type: ignore[assignment]
    outer = stepping[1:] if stepping[:1] == [optimizer] else stepping  # without the step whose hook this is
    mine = groups_by_parameter(optimizer) if outer else {}
    return [other for other in outer if not mine.keys().isdisjoint(groups_by_parameter(other))]
