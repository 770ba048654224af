"""`SORSAMetrics`: adds SORSA's metrics to each training log of a Trainer, before any reporter reads it."""

from __future__ import annotations

from typing import Any
from weakref import WeakSet

from torch.optim import Optimizer
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from sorsa_plugin.extend import Attachment, attachment_of, innermost

silent: WeakSet[Attachment] = WeakSet()
"""Attachments whose metrics are not logged, because their `SORSACallback` says so."""


class SORSAMetrics(TrainerCallback):
    """One of the callbacks that every Trainer begins with; it does nothing in a run without SORSA.

    A Trainer calls its reporters before the callbacks that it was given. Callbacks that it begins with come before the
    reporters, and what they add to a log is there for all: console, TensorBoard, Weights & Biases, log_history.
    `trainer.remove_callback(SORSAMetrics)` takes it out.

    Metrics: `sorsa/gap_mean` and `sorsa/gap_max` over all factors; `sorsa/reg_loss`, what the penalty adds to the
    training loss; `sorsa/gamma`, the regularizer's rate at this step.
    """

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        """Add the metrics to a training log, and to its entry in log_history, which was made before."""
        if logs is None or "loss" not in logs or "sorsa/gamma" in logs:
            return
        inner = innermost(optimizer)
        attachment = attachment_of(inner) if isinstance(inner, Optimizer) else None
        if attachment is None or attachment in silent:
            return
        metrics = attachment.metrics(inner)
        logs.update(metrics)
        last = state.log_history[-1] if state.log_history else {}
        if "loss" in last and last.get("step") == state.global_step:
            last.update(metrics)
