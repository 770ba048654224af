"""Makes a trainer leave a finished run alone: the Trainer takes one more step each time that one is resumed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sorsa_plugin.extend import say

from .trainer_compat import RUNS_AN_EPOCH, replace


def take_no_step_when_finished(trainer: Any) -> None:
    """Make a trainer end as after its last step when the checkpoint that it resumes from is of its last step.

    The best model is loaded, if that is asked for, and callbacks hear of the end.
    """

    def unless_finished(run: Callable[..., None]) -> Callable[..., None]:
        def run_epoch(*args: Any, **kwargs: Any) -> None:
            if trainer.state.global_step >= trainer.state.max_steps > 0:
                say("All %d steps of this run were taken before: nothing is trained.", trainer.state.max_steps)
                trainer.control.should_training_stop = True
            else:
                run(*args, **kwargs)

        return run_epoch

    replace(trainer, RUNS_AN_EPOCH, unless_finished)
