"""Makes a trainer complete each model card that it writes over the one saved with the adapter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from peft import PeftModel

from sorsa_plugin.extend import SORSAConfig, complete_model_card, public_name

from .trainer_compat import WRITES_A_CARD, replace


def complete_cards_of(trainer: Any) -> None:
    """Make a trainer complete each card that it writes, and name no data that lie on this machine."""

    def completing(write: Callable[..., None]) -> Callable[..., None]:
        def create_model_card(*args: Any, **kwargs: Any) -> None:
            data = kwargs.get("dataset_name")
            if isinstance(data, str) and public_name(data) != data:  # TRL would link to it on the hub
                kwargs["dataset_name"] = None
            write(*args, **kwargs)
            complete_card_of(trainer)

        return create_model_card

    replace(trainer, WRITES_A_CARD, completing)


def complete_card_of(trainer: Any) -> None:
    """Put SORSA's section into the card that a trainer has just written, if its model has such an adapter.

    The model may wrap the one that PEFT adapted, as those with a value head do.
    """
    adapted = next((module for module in trainer.model.modules() if isinstance(module, PeftModel)), None)
    config = getattr(adapted, "active_peft_config", None)
    if isinstance(config, SORSAConfig) and trainer.is_world_process_zero():
        complete_model_card(trainer.args.output_dir, config.card_values(), adapter=trainer.hub_model_id)
