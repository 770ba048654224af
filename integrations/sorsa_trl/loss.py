"""The loss wrapper: a trainer that reports training loss + gamma/eta_max * L_reg, and both on their own.

Only the report is the wrapper's. The gradient arrives through `sorsa_plugin.attach`, once per optimizer step, as with
`SORSACallback` or with `peft_config` alone, so that the three train the same weights whatever the gradient
accumulation, loss scaling or number of processes. The evaluation loss has no penalty.
"""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from transformers import Trainer

from sorsa_plugin.engines import innermost
from sorsa_transformers import SORSACallback

TrainerClass = TypeVar("TrainerClass", bound=type[Trainer])


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
        if given is not None:  # it has been asked for the regularizer; what it logs would come twice
            trainer.remove_callback(given)
        self.regularizer = SORSACallback(trainer, gamma=given.gamma if given else None, log=False)
        trainer.add_callback(self.regularizer)
        self._penalties: dict[int, torch.Tensor] = {}
        """Penalty of each optimizer step since the last report, as it was when the step's forward ran."""

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The loss of one micro-batch as the Trainer sums them, with its share of the step's penalty."""
        loss = super().training_step(*args, **kwargs)  # type: ignore[misc]
        trainer: Any = self
        step, attachment = trainer.state.global_step, self.regularizer.attachment
        if attachment is None:
            return loss
        if step not in self._penalties:
            self._penalties[step] = attachment.penalty(innermost(trainer.optimizer))
        return loss + self._penalties[step].to(loss) / trainer.current_gradient_accumulation_steps

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs and self._penalties and self.regularizer.attachment is not None:
            penalty = float(torch.stack(list(self._penalties.values())).double().mean())
            self._penalties.clear()
            trainer: Any = self
            logs |= self.regularizer.attachment.metrics(innermost(trainer.optimizer))
            logs |= {"sorsa/reg_loss": penalty, "sorsa/task_loss": logs["loss"] - penalty}
        super().log(logs, *args, **kwargs)  # type: ignore[misc]


def with_orthonormal_loss(trainer_class: TrainerClass) -> TrainerClass:
    """A Trainer class that reports SORSA's regularized loss; see `OrthonormalLoss`.

        trainer = with_orthonormal_loss(SFTTrainer)(model, args=..., peft_config=SORSAConfig(...))

    Args:
        trainer_class: transformers' Trainer or a subclass of it: TRL's SFTTrainer, DPOTrainer, ...
    """
    if issubclass(trainer_class, OrthonormalLoss):
        return trainer_class
    attributes = {"__doc__": f"{trainer_class.__name__} that reports SORSA's regularized loss; see `OrthonormalLoss`."}
    return type(f"SORSA{trainer_class.__name__}", (OrthonormalLoss, trainer_class), attributes)  # type: ignore[return-value]
