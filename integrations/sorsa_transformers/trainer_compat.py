"""What this package uses of transformers' Trainer, and of PEFT's training calls, beyond their documented API.

Seen in transformers 5.6.0 and 5.23.0, PEFT 0.20.0 and 0.21.2.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
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

WRITES_A_CARD = "create_model_card"
LOADS_THE_BEST = "_load_best_model"
LOADS_A_CHECKPOINT = "_load_from_checkpoint"
RUNS_AN_EPOCH = "_run_epoch"

TRAINER = (
    *("add_callback", "remove_callback", "callback_handler", "hub_model_id", "is_deepspeed_enabled", "is_fsdp_enabled"),
    *(WRITES_A_CARD, LOADS_THE_BEST, LOADS_A_CHECKPOINT, RUNS_AN_EPOCH),
)
"""Attributes that are called or replaced on a Trainer. Its `__init__` calls `callback_handler.on_init_end`, from which
`trainer_methods.py` finds it; gone: cards that a trainer writes before a push stay without SORSA's section, adapters of
`model.add_adapter()` are not resumed, and a finished run takes another step."""


def replace(trainer: Any, name: str, made_of: Callable[[Callable[..., None]], Callable[..., None]]) -> None:
    """Replace a method of one trainer by what is made of it, once. A method that is gone is left alone."""
    method = getattr(trainer, name, None)
    if method is not None and name not in vars(trainer):
        setattr(trainer, name, wraps(method)(made_of(method)))
