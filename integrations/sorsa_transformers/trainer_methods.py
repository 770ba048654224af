"""`SORSATrainerMethods`: replaces methods of a trainer that is being made, where no event of it reaches a callback."""

from __future__ import annotations

import sys
from typing import Any

from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from sorsa_plugin.extend import sorsa_layers

from .adapter_loading import load_adapters_of
from .cards import complete_cards_of
from .finished_runs import take_no_step_when_finished


class SORSATrainerMethods(TrainerCallback):
    """One of the callbacks that every Trainer begins with; it does nothing in a run without SORSA.

    A trainer writes its card between saving and uploading, loads a checkpoint before training begins and the best one
    before it ends, and takes a step whatever a callback says first.
    """

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        """Replace the methods of the trainer that is being made. Events do not name it; it is the one that calls."""
        frame = sys._getframe(1)
        while frame is not None and not isinstance(frame.f_locals.get("self"), Trainer):
            frame = frame.f_back  # type: ignore[assignment]
        if frame is not None and model is not None and sorsa_layers(model):
            replace_methods_of(frame.f_locals["self"])


def replace_methods_of(trainer: Any) -> None:
    """Make a trainer complete cards, load the adapters that it saved, and leave a finished run alone."""
    complete_cards_of(trainer)
    load_adapters_of(trainer)
    take_no_step_when_finished(trainer)
