"""`SORSACallback`: finds the optimizer for `attach`, keeps offsets fp32, checks every step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from sorsa_distributed import complete_sharded_checkpoint
from sorsa_plugin.errors import AttachError
from sorsa_plugin.extend import (
    Attachment,
    attach,
    frozen_as_parameters,
    groups_by_parameter,
    innermost,
    model_factors,
    say,
    sorsa_layers,
    trained_adapters,
)

from .metrics import silent
from .trainer_compat import LayerWiseDummyOptimizer
from .trainer_methods import replace_methods_of


class SORSACallback(TrainerCallback):
    """Controls and logs SORSA's orthonormal regularizer in a Trainer.

        Trainer(..., callbacks=[SORSACallback()])

    The metrics (`SORSAMetrics`) are logged without it too. It attaches the regularizer before the first step, raises
    where the optimizer does not deliver it, and stops a run whose gradients are not finite before they are saved.

    Args:
        trainer: the trainer that the callback is added to, if it was made before its model got the adapter.
        gamma: overrides the adapters' gamma.
        log: whether the metrics are logged.

    Raises (when training begins):
        NoAdaptedLayersError, AttachError: see `sorsa_plugin.attach()`.
    """

    def __init__(self, trainer: Trainer | None = None, *, gamma: float | None = None, log: bool = True) -> None:
        self.log = log
        self.gamma = gamma
        self.attachment: Attachment | None = None
        self._steps_seen = 0
        if trainer is not None:
            self._prepare(trainer.model)
            replace_methods_of(trainer)

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        """Prepare the model before the Trainer wraps it and builds the optimizer."""
        self._prepare(model)

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        """Attach the regularizer to the Trainer's optimizer.

        Raises:
            NoAdaptedLayersError, SORSAConfigError, AttachError: see `sorsa_plugin.attach()`. Also AttachError if the
                optimizer steps U and V of an adapter and not its S.
        """
        inner = innermost(optimizer)
        if isinstance(inner, LayerWiseDummyOptimizer):
            return self._attach_to_each(model, list(inner.optimizer_dict.values()))
        self.attachment = attach(model, optimizer, gamma=self.gamma)
        self._steps_seen = self.attachment.steps
        if not self.log:
            silent.add(self.attachment)
        _require_singular_values(model, inner)

    def _attach_to_each(self, model: nn.Module, optimizers: list[Any]) -> None:
        """Attach to the Trainer's layerwise optimizers: one for each parameter, which steps in backward."""
        factors = {id(factor.offset) for factor in model_factors(model)}
        for optimizer in optimizers:
            if factors & set(groups_by_parameter(optimizer)):
                attach(model, optimizer, gamma=self.gamma)
        say("Each parameter has an optimizer of its own: the regularizer acts in each, and its metrics are not logged.")

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        """Check that the optimizer step called the regularizer.

        Raises:
            AttachError: a training step ended without a call of the regularizer's hook.
            NonFiniteGradientError: a checkpoint is due, and the gradients of this step were not finite.
        """
        if self.attachment is None:
            return
        skipped = bool(getattr(optimizer, "step_was_skipped", False))
        if self.attachment.steps == self._steps_seen and not skipped and self.attachment.settings().gamma > 0:
            raise AttachError(
                f"A training step ended and {type(innermost(optimizer)).__name__} never called the regularizer's "
                "hook, so the factors were trained without it. Use an optimizer whose step() runs after backward(), "
                "or set gamma=0."
            )
        self._steps_seen = self.attachment.steps
        if skipped and not args.fp16:  # fp16 skips steps as a matter of course
            self.attachment.name_skipped_step(state.global_step)
        if control.should_save:
            self.attachment.watch.settle()  # raises before factors that are lost are saved

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        """Check the gradients of the last step: on a GPU, no later step does.

        Raises:
            NonFiniteGradientError: they were not finite.
        """
        if self.attachment is not None:
            self.attachment.watch.settle()

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        """Put the adapter's config beside FSDP2's shards."""
        if state.is_world_process_zero and model is not None:
            complete_sharded_checkpoint(Path(args.output_dir) / f"checkpoint-{state.global_step}", model)

    @staticmethod
    def _prepare(model: nn.Module | None) -> None:
        """Do what has to happen before the Trainer wraps the model and builds the optimizer."""
        for layer in sorsa_layers(model) if model is not None else []:
            for adapter in layer.sorsa_factors:
                factors = layer.factors(adapter)
                factors.place_frozen(frozen_as_parameters())
                if adapter in layer.trained():
                    factors.restore_fp32()


def _require_singular_values(model: nn.Module, optimizer: Any) -> None:
    """Raises AttachError if the only optimizer of a run steps U of an adapter and not its S.

    Engines that step other tensors in place of the adapter's own are not checked: they step S too.
    """
    stepped = groups_by_parameter(optimizer)
    for layer, name, tensors in trained_adapters(sorsa_layers(model)):
        steps_vectors = id(tensors.dU) in stepped or id(tensors.dV) in stepped
        if steps_vectors and tensors.dS.requires_grad and id(tensors.dS) not in stepped:
            raise AttachError(
                f"{type(optimizer).__name__} steps U, V of {layer.name}.{name} and not S, which would stay as it is; "
                "some optimizers (Muon) leave out tensors of one dimension. Use another, such as adamw_torch, or give "
                "it S in a parameter group of its own."
            )
