"""Makes a trainer complete each model card that it writes over the one saved with the adapter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sorsa_plugin.extend import SORSAConfig, complete_model_card

from .trainer_compat import WRITES_A_CARD, replace


def complete_cards_of(trainer: Any) -> None:
    """Make a trainer complete each card that it writes."""

    def completing(write: Callable[..., None]) -> Callable[..., None]:
        def create_model_card(*args: Any, **kwargs: Any) -> None:
            write(*args, **kwargs)
            config = getattr(trainer.model, "active_peft_config", None)
            if isinstance(config, SORSAConfig) and trainer.is_world_process_zero():
                complete_model_card(trainer.args.output_dir, config.card_values(), adapter=trainer.hub_model_id)

        return create_model_card

    replace(trainer, WRITES_A_CARD, completing)
