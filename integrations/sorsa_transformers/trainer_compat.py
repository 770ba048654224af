"""What this package uses of transformers' Trainer, and of PEFT's training calls, beyond their documented API.

Seen in transformers 5.6.0 and 5.23.0, PEFT 0.20.0 and 0.21.2.
"""

from __future__ import annotations

from typing import Any

from peft.tuners.adamss.asa_callback import AdamssAsaCallback
from peft.tuners.lora.eva import initialize_lora_eva_weights
from transformers.trainer import DEFAULT_CALLBACKS
from transformers.trainer_pt_utils import LayerWiseDummyOptimizer

ENTRIES = {
    "DEFAULT_CALLBACKS": "callbacks that every Trainer begins with, before its reporters; gone: metrics reach no "
    "reporter",
    "LayerWiseDummyOptimizer": "the Trainer's stand-in where each parameter has an optimizer of its own; gone: nothing "
    "to find",
    "initialize_lora_eva_weights": "EVA's initialisation, with a forward of our own",
    "AdamssAsaCallback": "what AdaMSS calls after every step",
}

TRAINER = (
    *("create_model_card", "add_callback", "remove_callback", "callback_handler", "hub_model_id"),
    *("is_in_train", "_load_best_model"),
)
"""Attributes that are called or replaced on a Trainer. Its `__init__` calls `callback_handler.on_init_end`, from which
`cards.py` finds it; gone: cards that a trainer writes before a push stay without SORSA's section. Without
`_load_best_model`: load the adapter of `state.best_model_checkpoint`."""


def load_best_model(trainer: Any) -> None:
    """Load the best checkpoint, as the Trainer does when training ends."""
    trainer._load_best_model()
