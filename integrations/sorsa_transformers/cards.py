"""`SORSACards`: makes a trainer complete each model card that it writes over the one saved with the adapter."""

from __future__ import annotations

import sys
from functools import wraps
from typing import Any

from peft import PeftModel
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from sorsa_plugin.extend import SORSAConfig, complete_model_card


class SORSACards(TrainerCallback):
    """One of the callbacks that every Trainer begins with; it does nothing in a run without SORSA.

    A trainer writes the card between saving and uploading, when no event reaches a callback. So the trainer's own
    method is wrapped when the trainer is made.
    """

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        """Wrap the method of the trainer that is being made. Events do not name it; it is the one that calls."""
        frame = sys._getframe(1)
        while frame is not None and not isinstance(frame.f_locals.get("self"), Trainer):
            frame = frame.f_back  # type: ignore[assignment]
        if frame is not None and _config_of(model) is not None:
            complete_cards_of(frame.f_locals["self"])


def complete_cards_of(trainer: Any) -> None:
    """Make a trainer complete each card that it writes."""
    if "create_model_card" in vars(trainer):
        return
    write = trainer.create_model_card

    @wraps(write)
    def create_model_card(*args: Any, **kwargs: Any) -> None:
        write(*args, **kwargs)
        complete_card_of(trainer)

    trainer.create_model_card = create_model_card


def complete_card_of(trainer: Any) -> None:
    """Put SORSA's section into the card that a trainer has just written, if its model has such an adapter."""
    config = _config_of(trainer.model)
    if config is not None and trainer.is_world_process_zero():
        complete_model_card(trainer.args.output_dir, config.card_values(), adapter=trainer.hub_model_id)


def _config_of(model: Any) -> SORSAConfig | None:
    """Of the active adapter, if it is SORSA's. The model may wrap a PEFT model, as those with a value head do."""
    modules = model.modules() if model is not None else ()
    adapted = next((module for module in modules if isinstance(module, PeftModel)), None)
    config = getattr(adapted, "active_peft_config", None)
    return config if isinstance(config, SORSAConfig) else None
