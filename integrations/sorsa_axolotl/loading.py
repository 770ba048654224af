"""Puts the adapter on Axolotl's model: a new one, or a saved one to continue, run or merge."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from peft import PeftModel, get_peft_model
from transformers import GenerationConfig

from sorsa_plugin import SORSAConfig
from sorsa_plugin.errors import ForeignAdapterError
from sorsa_plugin.extend import read_config, say

from .axolotl_compat import find_all_linear_names
from .checkpoints import require_own_adapter
from .recipe import BLOCK, make_config

REGULARIZER = ("gamma", "reg_update", "reg_schedule")
"""Options that a run may change when it continues a saved adapter."""

SHAPE = (
    "r",
    "target_modules",
    "target_parameters",
    "exclude_modules",
    "rank_pattern",
    "layers_to_transform",
    "modules_to_save",
    "trainable_token_indices",
)
"""Options that are fixed once an adapter is made."""

ORIGIN = ("svd", "svd_seed", "svd_energy", "full_precision_base")
"""Options of the block that say how a new adapter is made."""

HEAD_MODULES = {"classifier", "score"}
"""Modules that PEFT adds to modules_to_save by itself, in models that classify."""


def load(model: Any, cfg: Any, trains: bool) -> tuple[PeftModel, SORSAConfig]:
    """The model with the recipe's adapter and the adapter's config; a saved adapter if the recipe has `lora_model_dir`.

    Args:
        model, cfg: Axolotl's.
        trains: False for inference or merging.

    Raises:
        ForeignAdapterError, IncompleteAdapterError, BaseMismatchError: the adapter in `lora_model_dir` does not fit.
        AdapterOptionsError, SORSAConfigError: see `make_config`.
    """
    if cfg.lora_model_dir:
        adapted, config = load_saved(model, cfg, trains)
    else:
        config = new_config(model, cfg)
        adapted = get_peft_model(model, config)
    if int(os.environ.get("LOCAL_RANK", 0)) == 0:
        adapted.print_trainable_parameters()
    return adapted, config


def new_config(model: Any, cfg: Any) -> SORSAConfig:
    """The config of a new adapter for this model.

    Raises:
        AdapterOptionsError, SORSAConfigError: see `make_config`.
    """
    return make_config(cfg, find_all_linear_names(model), task_type(model))


def load_saved(model: Any, cfg: Any, trains: bool) -> tuple[PeftModel, SORSAConfig]:
    """A saved adapter and its config. The recipe's regularizer options replace those that it was saved with.

    Raises:
        ForeignAdapterError, IncompleteAdapterError, BaseMismatchError: the adapter in `lora_model_dir` does not fit.
    """
    directory = Path(cfg.lora_model_dir)
    config = read_config(directory) if directory.is_dir() else SORSAConfig.from_pretrained(cfg.lora_model_dir)
    if not isinstance(config, SORSAConfig):  # PEFT gives the config of whatever method a hub id holds
        raise ForeignAdapterError(
            f"{cfg.lora_model_dir} holds an adapter of {config.peft_type.value}; expected SORSA. Give a SORSA adapter, "
            "or say adapter: lora."
        )
    if trains:
        require_own_adapter(cfg.lora_model_dir, config, cfg.adapter)
        _follow(new_config(model, cfg), config, dict(cfg.get(BLOCK) or {}), cfg.lora_model_dir)
    if not trains and not hasattr(model, "generation_config"):  # Axolotl's merging writes to it, whatever the head
        model.generation_config = GenerationConfig()
    placement = {"max_memory": {"cpu": "256GiB"}, "device_map": {"": "cpu"}} if cfg.lora_on_cpu else {}
    adapted = PeftModel.from_pretrained(model, cfg.lora_model_dir, is_trainable=trains, config=config, **placement)
    return adapted, config


def task_type(model: Any) -> str:
    """PEFT's task type, by the class of the model's head."""
    name = type(model).__name__
    return next((kind for word, kind in HEADS.items() if word in name), "CAUSAL_LM")


HEADS = {"SequenceClassification": "SEQ_CLS", "TokenClassification": "TOKEN_CLS"}


def _follow(recipe: SORSAConfig, saved: SORSAConfig, block: dict[str, Any], directory: str) -> None:
    """Give a saved config the recipe's regularizer and dropout. Log what else of the recipe it cannot follow."""
    if set(block) & set(REGULARIZER):
        for name in REGULARIZER:
            setattr(saved, name, getattr(recipe, name))
    elif _regularizer(saved) != _regularizer(recipe):
        say("The adapter in %s keeps the regularizer that it was saved with, %s. The sorsa block would change it.",
            directory, _regularizer(saved))  # fmt: skip
    saved.sorsa_dropout = recipe.sorsa_dropout
    names = [*SHAPE, *(name for name in ORIGIN if name in block)]
    pairs = {name: (getattr(saved, name) or None, getattr(recipe, name) or None) for name in names}
    if recipe.modules_to_save is None and set(saved.modules_to_save or ()) <= HEAD_MODULES:
        del pairs["modules_to_save"]
    differing = {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}
    if differing:
        listed = ", ".join(f"{name} {kept!r}, not {asked!r}" for name, (kept, asked) in differing.items())
        say("The adapter in %s keeps what it was made with: %s.", directory, listed)


def _regularizer(config: SORSAConfig) -> str:
    schedule = f", {config.resolved_reg_schedule}" if config.reg_update == "decoupled" else ""
    return f"gamma {config.resolved_gamma:g}, {config.reg_update}{schedule}"
