"""Tells whether an optimizer's step is part of another's, as where a subclass calls `super().step()`, or with SAM,
Lookahead, and several optimizers in one.

Torch runs hooks for each of them, and which ones it does depends on what else the process has made: it puts hooks on a
class when the first instance of just that class is made. Asked is the stack of calls, so that a step that raised leaves
nothing behind.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

from torch.optim.optimizer import Optimizer

STEP = Optimizer.profile_hook_step(lambda *args: None).__code__
"""What torch puts around the `step` of every class of optimizers, to call hooks."""


def enclosing_steps(optimizer: Optimizer) -> Iterator[Optimizer]:
    """The optimizers that share parameters with one and whose `step` called its own, from the inside to the outside;
    itself, where its class's `step` calls that of the class above. To be asked in a hook of a step."""
    frame, own = sys._getframe(1), True
    parameters = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    while frame is not None:
        if frame.f_code is STEP:
            stepping = frame.f_locals["args"][0]
            if own and stepping is optimizer:
                own = False  # the step whose hook this is
            elif any(id(parameter) in parameters for group in stepping.param_groups for parameter in group["params"]):
                yield stepping
        frame = frame.f_back  # type: ignore[assignment]
