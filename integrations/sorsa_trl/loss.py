"""The loss wrapper: a trainer that reports training loss + gamma/eta_max * L_reg, and each of the two.

The wrapper only reports. The gradient arrives through `sorsa_plugin.attach`, once per optimizer step, as with
`SORSACallback` or with `peft_config` alone. So all three train the same weights, whatever the gradient accumulation,
loss scaling or number of processes. The evaluation loss has no penalty.
"""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from transformers import Trainer

from sorsa_plugin.extend import innermost
from sorsa_transformers import SORSACallback

TrainerClass = TypeVar("TrainerClass", bound=type[Trainer])


class _Penalties:
    """The penalties of the optimizer steps since the last report, each computed in the step's first micro-batch."""

    def __init__(self) -> None:
        self.step = -1
        self.newest = torch.zeros(())
        self.total: torch.Tensor | float = 0.0
        self.steps = 0

    def add(self, step: int, penalty: torch.Tensor) -> None:
        self.step, self.newest = step, penalty
        self.total = self.total + penalty.double()
        self.steps += 1

    def take_mean(self) -> float:
        mean = float(self.total) / self.steps
        self.total, self.steps = 0.0, 0
        return mean


class _Regularizer(SORSACallback):
    """The wrapper's callback. Each training run starts without penalties that an earlier run did not report."""

    def __init__(self, trainer: Trainer, gamma: float | None) -> None:
        super().__init__(trainer, gamma=gamma)
        self.penalties = _Penalties()

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        super().on_train_begin(*args, **kwargs)
        self.penalties = _Penalties()


class OrthonormalLoss:
    """Mixin for a Trainer: adds SORSA's penalty to the training loss that is reported.

    Logged beside `loss`, to every reporter: `sorsa/task_loss` and `sorsa/reg_loss`, which add up to it, averaged over
    the same steps; `sorsa/gap_mean`, `sorsa/gap_max` and `sorsa/gamma` as they are at that step.

    Raises (when training begins):
        NoAdaptedLayersError, AttachError: see `sorsa_plugin.attach()`.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        trainer: Any = self
        given = next((c for c in trainer.callback_handler.callbacks if isinstance(c, SORSACallback)), None)
        if given is not None:  # its gamma is used below
            trainer.remove_callback(given)
        self.regularizer = _Regularizer(trainer, given.gamma if given else None)
        trainer.add_callback(self.regularizer)

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The loss of one micro-batch (scalar), in the Trainer's scale, plus its share of the step's penalty."""
        loss = super().training_step(*args, **kwargs)  # type: ignore[misc]
        trainer: Any = self
        step, attachment, penalties = trainer.state.global_step, self.regularizer.attachment, self.regularizer.penalties
        if attachment is None:
            return loss
        if penalties.step != step:
            penalties.add(step, attachment.penalty(innermost(trainer.optimizer)))
        return loss + penalties.newest.to(loss) / trainer.current_gradient_accumulation_steps

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """The Trainer's method. Adds the metrics to a training log."""
        attachment, penalties = self.regularizer.attachment, self.regularizer.penalties
        if "loss" in logs and penalties.steps and attachment is not None:
            penalty = penalties.take_mean()
            trainer: Any = self
            logs |= attachment.metrics(innermost(trainer.optimizer))
            logs |= {"sorsa/reg_loss": penalty, "sorsa/task_loss": logs["loss"] - penalty}
        super().log(logs, *args, **kwargs)  # type: ignore[misc]


def with_orthonormal_loss(trainer_class: TrainerClass) -> TrainerClass:
    """A Trainer class that reports SORSA's regularized loss; see `OrthonormalLoss`.

        trainer = with_orthonormal_loss(SFTTrainer)(model, args=..., peft_config=SORSAConfig(...))

    Args:
        trainer_class: transformers' Trainer or a subclass of it: TRL's SFTTrainer, DPOTrainer, ...

    Returns:
        A subclass of `trainer_class`; the class itself if it is one already.
    """
    if issubclass(trainer_class, OrthonormalLoss):
        return trainer_class
    attributes = {"__doc__": f"{trainer_class.__name__} that reports SORSA's regularized loss; see `OrthonormalLoss`."}
    return type(f"SORSA{trainer_class.__name__}", (OrthonormalLoss, trainer_class), attributes)  # type: ignore[return-value]
