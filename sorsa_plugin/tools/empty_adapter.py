"""Puts an adapter on a model without weights, to see what is targeted and in which shapes before anything is read."""

from __future__ import annotations

from copy import deepcopy
from typing import TYPE_CHECKING

from peft import PeftConfig, PeftModel, get_peft_model

from ..errors import SORSAConfigError, SORSAError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ADAPTER = "default"


def adapt_empty(empty: PreTrainedModel, config: PeftConfig, revision: str | None = None) -> PeftModel:
    """get_peft_model on a model on the meta device, with a copy of the config.

    Raises:
        SORSAConfigError: PEFT refuses the options, or finds nothing to adapt.
    """
    try:
        return get_peft_model(empty, deepcopy(config), adapter_name=ADAPTER, revision=revision)
    except SORSAError:
        raise
    except (ValueError, TypeError) as error:
        raise SORSAConfigError(f"PEFT refuses these options for {type(empty).__name__}: {error}") from error
