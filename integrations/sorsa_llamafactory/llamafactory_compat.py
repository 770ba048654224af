"""What this package uses of LLaMA-Factory, which has no place for a new method. Seen in LLaMA-Factory 0.9.5.

Its functions are replaced where they are looked up. Each entry says what for. A registry of PEFT configs in
LLaMA-Factory would make this file superfluous; docs/llamafactory.md has the proposal.
"""

from __future__ import annotations

from typing import Any

from llamafactory import launcher
from llamafactory.hparams import parser
from llamafactory.model import adapter
from llamafactory.train import trainer_utils, tuner
from transformers import Trainer

from sorsa_transformers.cards import complete_card_of

from . import worker
from .recipe import make_config, translated

ENTRIES = {
    "parser.read_args": "reads the recipe; ours takes `finetuning_type: sorsa` and the block out of it",
    "tuner.read_args": "the same function, looked up by `train`",
    "adapter.LoraConfig": "makes the config of a new adapter; ours makes a SORSAConfig if the recipe says so",
    "trainer_utils.Trainer": "the base class writes the model card, not the trainer; ours then completes it",
    "launcher.launch": "llamafactory-cli's commands",
    "launcher.__file__": "the script that torchrun starts in every process; ours does this file's work there too",
}

DROPPED = ("lora_alpha", "use_rslora", "use_dora", "inference_mode")
"""Arguments for LoraConfig that LLaMA-Factory always gives: they mean nothing here, or are refused in the recipe."""

chosen: dict[str, Any] = {"options": None}
"""The options of the recipe's block; None while no recipe for SORSA was read."""


class CompleteCards(Trainer):
    """A base class whose card has SORSA's section."""

    @staticmethod
    def create_model_card(trainer: Trainer, **values: Any) -> None:
        Trainer.create_model_card(trainer, **values)
        complete_card_of(trainer)


def patch() -> None:
    """Teach LLaMA-Factory the word. Without a recipe that says it, everything is as before."""
    read_args, lora_config = parser.read_args, adapter.LoraConfig

    def read(args: Any = None) -> Any:
        recipe = translated(read_args(args))
        if recipe.options is not None:
            chosen["options"] = recipe.options
        return recipe.arguments

    def config(**given: Any) -> Any:
        if chosen["options"] is None:
            return lora_config(**given)
        return make_config(chosen["options"], **{word: value for word, value in given.items() if word not in DROPPED})

    parser.read_args = tuner.read_args = read
    adapter.LoraConfig = config
    trainer_utils.Trainer = CompleteCards
    launcher.__file__ = worker.__file__


launch = launcher.launch
run_exp = tuner.run_exp
