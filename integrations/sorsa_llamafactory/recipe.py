"""Translates a LLaMA-Factory recipe with `finetuning_type: sorsa`; refuses what SORSA cannot honour."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from sorsa_plugin import SORSAConfig, setup_adapter
from sorsa_plugin.errors import AdapterOptionsError
from sorsa_plugin.extend import read_config, say

WORD = "sorsa"
"""What `finetuning_type` says, and the recipe's block of options."""

KEY = "finetuning_type"

REFUSED = {
    "use_dora": "DoRA is another method",
    "use_rslora": "rsLoRA is a scale for LoRA, and SORSA has no scale",
    "pissa_init": "PiSSA is another method; SORSA starts from the singular triplets anyway",
    "pissa_convert": "SORSA leaves the base as it is, so there is nothing to convert back",
    "loraplus_lr_ratio": "it is a learning rate for lora_B, which SORSA does not have",
    "use_unsloth": "its kernels compute LoRA's forward",
    "use_kt": "KTransformers computes LoRA's forward",
    "use_mca": "Megatron adapts its own layers",
}
"""{key: why it is refused}. Each would change nothing, or ask for another method than SORSA."""

OWN = frozenset(item.name for item in fields(SORSAConfig)) - {"revision", "task_type", "base_model_name_or_path"}
"""Options that belong into the block: fields of `SORSAConfig`, without those that every config of PEFT's has."""


class Recipe(NamedTuple):
    """A recipe as LLaMA-Factory reads it, and what it says about SORSA.

    Attributes:
        arguments: with `finetuning_type: lora`, which is what LLaMA-Factory calls every adapter.
        options: of the block; None if the recipe is not for SORSA.
    """

    arguments: Any
    options: dict[str, Any] | None


def translated(arguments: Mapping[str, Any] | list[str]) -> Recipe:
    """The recipe without what LLaMA-Factory does not know.

    Args:
        arguments: keys of a recipe, or arguments of a command line ("--finetuning_type", "sorsa", ...).

    Raises:
        AdapterOptionsError: SORSA cannot honour some keys, all of which the message names, or an option of the block.
        ForeignAdapterError: the adapter that training should go on with is of another method.
    """
    if isinstance(arguments, list):
        return _from_command_line(arguments)
    if arguments.get(KEY) != WORD:
        if WORD in arguments:
            say("%s is %s: the block %s is not used.", KEY, arguments.get(KEY, "lora"), WORD)
        return Recipe({key: value for key, value in arguments.items() if key != WORD}, None)
    kept = {key: value for key, value in arguments.items() if key != WORD} | {KEY: "lora"}
    block = dict(arguments.get(WORD) or {})
    _refuse_unhonoured(arguments)
    rate, others = block.get("learning_rate"), kept.get("learning_rate")
    if rate is not None:
        if others is not None and str(others) != str(rate):
            say("learning_rate is %s, as the block %s says; %s is for other methods.", rate, WORD, others)
        kept["learning_rate"] = rate
    make_config(block, r=kept.get("lora_rank", 8), target_modules=["every_linear"])
    _require_sorsa(kept)
    return Recipe(kept, block)


def make_config(options: Mapping[str, Any], **words: Any) -> SORSAConfig:
    """The adapter's config.

    Args:
        options: of the recipe's block.
        words: of `setup_adapter`'s vocabulary.

    Raises:
        AdapterOptionsError, SORSAConfigError: an option has a value that cannot be honoured.
    """
    given = {word: value for word, value in words.items() if value is not None}
    config = setup_adapter({"adapter": WORD, **given, WORD: dict(options)}).peft_config
    assert isinstance(config, SORSAConfig)
    return config


def _from_command_line(arguments: list[str]) -> Recipe:
    """The same for flags, which have no block."""
    given = _flags(arguments)
    if given.get(KEY) != WORD:
        return Recipe(arguments, None)
    _refuse_unhonoured(given)
    _require_sorsa(given)
    kept = list(arguments)
    place = next(place for place, argument in enumerate(kept) if argument.partition("=")[0] == f"--{KEY}")
    kept[place : place + (1 if "=" in kept[place] else 2)] = [f"--{KEY}", "lora"]
    return Recipe(kept, {})


def _flags(arguments: list[str]) -> dict[str, Any]:
    """{name: value} of "--name value", "--name=value" and a bare "--name", which is true."""
    found: dict[str, Any] = {}
    for argument, following in zip(arguments, [*arguments[1:], "--"], strict=True):
        if argument.startswith("--"):
            name, equals, value = argument[2:].partition("=")
            found[name] = yaml.safe_load(value if equals else "true" if following.startswith("--") else following)
    return found


def _refuse_unhonoured(recipe: Mapping[str, Any]) -> None:
    lines = [f"{key}: {why}. Delete it." for key, why in REFUSED.items() if recipe.get(key)]
    lines += [f"{key} belongs into the block: `{WORD}: {{{key}: ...}}`." for key in recipe if key in OWN]
    if lines:
        raise AdapterOptionsError(f"{KEY}: {WORD} cannot honour this recipe.\n" + "\n".join(lines))


def _require_sorsa(recipe: Mapping[str, Any]) -> None:
    """Training goes on with the last of the adapters: it has to be SORSA's, or LoRA would be trained in its name."""
    adapters = recipe.get("adapter_name_or_path")
    if not adapters or not recipe.get("do_train") or recipe.get("create_new_adapter"):
        return
    last = Path(str(adapters).split(",")[-1].strip())
    if last.is_dir():
        read_config(last)
