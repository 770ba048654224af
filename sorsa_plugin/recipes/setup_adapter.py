"""One config key, many adapters: `adapter: sorsa` in a dict, a dataclass or YAML becomes a PEFT config and callbacks.

Options that most methods have share one vocabulary (`VOCABULARY`). Options of one method go into a block named after
it:

    adapter: sorsa
    r: 16
    target_modules: all-linear
    sorsa: {gamma: 4.0e-4, svd: exact}

A block may name the `learning_rate` of its method too, which the caller gives to its trainer (`AdapterSetup`).

TRL's and Axolotl's spellings of the vocabulary are accepted. The types come through the `sorsa_adapters` seam. Blocks
of other methods may stay in the recipe and are not read, so that changing one word switches the method.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from os import PathLike
from typing import Any

import yaml
from peft import PeftConfig

from ..compat.peft import PEFT_TYPE_TO_CONFIG_MAPPING
from ..config import SORSAConfig
from ..config_checks import FILLED_IN
from ..errors import AdapterOptionsError, PluginError, nearest
from ..plugins import answers, broken_note
from .adapter_type import AdapterOptions, AdapterSetup, AdapterType
from .peft_methods import NEEDS_A_CALL, verbatim
from .yaml_values import yaml_values

VOCABULARY = {
    "r": "rank",
    "alpha": "LoRA's scale is alpha / r; methods without a scale report it as unused",
    "dropout": "dropout probability on the adapter's input",
    "target_modules": "module names, a regular expression, 'all-linear', or nothing for PEFT's defaults",
    "exclude_modules": "module names or a regular expression to leave out",
    "modules_to_save": "further modules that are trained in full and saved with the adapter",
    "layers_to_transform": "layer index or indices to adapt",
    "layers_pattern": "name of the layer list that layers_to_transform counts in",
    "rank_pattern": "{module name or regular expression: rank}",
    "target_parameters": "parameters, not modules, to adapt (experts of a mixture)",
    "trainable_token_indices": "tokens whose embeddings are trained",
    "task_type": "PEFT's task type: CAUSAL_LM, SEQ_CLS, ...",
}
"""Options that most methods have, by PEFT's names without the method's prefix."""

SPELLINGS = {
    **{f"lora_{name}": name for name in VOCABULARY},  # TRL's ModelConfig and Axolotl
    "peft_layers_to_transform": "layers_to_transform",
    "peft_layers_pattern": "layers_pattern",
    "peft_trainable_token_indices": "trainable_token_indices",
}
"""{other trainers' name: word of the vocabulary}"""

VARIANTS = {"use_dora": "dora", "peft_use_dora": "dora", "use_rslora": "rslora", "peft_use_rslora": "rslora"}
"""{flag by which TRL and Axolotl recipes turn LoRA into another method: that method}"""


def setup_adapter(options: Mapping[str, Any] | str | PathLike[str] | Any) -> AdapterSetup:
    """The PEFT config and the callbacks that one config key names.

    Args:
        options: a mapping, a dataclass instance (fields that are None do not count), or the path of a YAML file. It has
            the key `adapter` (a registered type's name, or any method that PEFT registers), keys of `VOCABULARY` or
            TRL's and Axolotl's spellings of them, and a block named after the method.

    Raises:
        AdapterOptionsError: a key or method is unknown (the message names the nearest known one), two spellings
            disagree, or the method cannot honour an option.
        PluginError: two plug-ins claim one name.
    """
    parsed = read_options(options)
    setup = adapter_type(parsed.adapter).setup(parsed)
    if parsed.learning_rate is None:
        return setup
    return dataclasses.replace(setup, learning_rate=parsed.learning_rate)


def registered_adapters() -> dict[str, AdapterType]:
    """The registered adapter types by name.

    Raises:
        PluginError: two plug-ins claim one name.
    """
    types: dict[str, AdapterType] = {}
    owners: dict[str, str] = {}
    for plugin, offered in answers("sorsa_adapters"):
        for kind in offered:
            if kind.name in types:
                raise PluginError(
                    f"The plug-ins {owners[kind.name]} and {plugin} both claim the adapter name {kind.name!r}; "
                    "expected one. Uninstall one of them, or ask its author for another name."
                )
            types[kind.name], owners[kind.name] = kind, plugin
    return types


def adapter_type(name: str) -> AdapterType:
    """The registered type of that name, or one made from PEFT's own registry.

    Raises:
        AdapterOptionsError: neither has the name, or the method needs a call that only Python code can make.
        PluginError: two plug-ins claim one name.
    """
    types = registered_adapters()
    if name in types:
        return types[name]
    if name in NEEDS_A_CALL:
        raise AdapterOptionsError(f"adapter: {name} needs {NEEDS_A_CALL[name]}.")
    registered = {kind.value.lower(): config for kind, config in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    if name in registered:
        return verbatim(name, registered[name])
    raise AdapterOptionsError(
        f"adapter is {name!r}; expected one of {', '.join(types)}, or a method that PEFT registers."
        f"{nearest(name, [*types, *registered])}{broken_note()}"
    )


def block_names() -> set[str]:
    """The names that a block of a method's own options can have."""
    return {*registered_adapters(), *(kind.value.lower() for kind in PEFT_TYPE_TO_CONFIG_MAPPING)}


def read_options(options: Mapping[str, Any] | str | PathLike[str] | Any) -> AdapterOptions:
    """The options in the vocabulary, from any source that `setup_adapter` takes.

    Raises:
        AdapterOptionsError: the source cannot be read, a key is unknown, or two spellings disagree.
    """
    given = _as_mapping(options)
    adapter = given.pop("adapter", None)
    if not isinstance(adapter, str):
        raise AdapterOptionsError(
            f"adapter is {adapter!r}; expected the name of an adapter type, such as 'sorsa', 'lora' or 'full'."
        )
    adapter = _variant(adapter, given)
    _axolotls_all_linear(given)
    blocks = block_names()
    own = _own_block(adapter, given)
    rate = _checked_rate(own.pop("learning_rate", None), adapter)
    common: dict[str, Any] = {}
    spelled: dict[str, str] = {}
    for key, value in given.items():
        name = SPELLINGS.get(key, key)
        if name not in VOCABULARY:
            if key in blocks and (value is None or isinstance(value, Mapping)):
                continue  # another method's block
            known = [*VOCABULARY, *SPELLINGS, *VARIANTS, "adapter", "adapter_options", *blocks]
            raise AdapterOptionsError(
                f"{key!r} is no option of an adapter; expected one of {', '.join(VOCABULARY)}, or a block of the "
                f"method's own options ({adapter}: {{...}}).{block_note(key) or nearest(key, known)}"
            )
        if name == "target_modules":
            value = _one_expression(value)
        if name in common and value is not None and common[name] != value:
            raise AdapterOptionsError(
                f"{spelled[name]} is {common[name]!r} and {key} is {value!r}, and both mean {name!r}. Keep one."
            )
        if value is not None:
            common[name], spelled[name] = value, key
    return AdapterOptions(adapter, common, own, rate)


def block_note(word: str) -> str:
    """' It belongs ...' if a word outside of SORSA's block, or what follows "sorsa_" in it, is an option of the block;
    else empty."""
    ours, pefts = ({item.name for item in dataclasses.fields(kind)} for kind in (SORSAConfig, PeftConfig))
    own = (ours | {"learning_rate"}) - pefts - VOCABULARY.keys() - set(FILLED_IN)
    name = word if word in own else word.removeprefix("sorsa_")
    return f" It belongs into the block of SORSA's own options: `sorsa: {{{name}: ...}}`." if name in own else ""


def _one_expression(names: Any) -> Any:
    """The string in a list of just "all-linear" or a regular expression: command lines make lists, PEFT wants
    strings."""
    single = isinstance(names, list) and len(names) == 1 and isinstance(names[0], str)
    if single and (names[0] == "all-linear" or not re.fullmatch(r"[\w.]+", names[0])):
        return names[0]
    return names


def _as_mapping(options: Any) -> dict[str, Any]:
    if isinstance(options, (str, PathLike)):
        try:
            with open(options, encoding="utf-8") as file:
                options = yaml_values(file)
        except (OSError, yaml.YAMLError) as error:
            raise AdapterOptionsError(
                f"{options} cannot be read as YAML: {error}. Give the path of a recipe."
            ) from error
    if dataclasses.is_dataclass(options) and not isinstance(options, type):
        values = {item.name: getattr(options, item.name) for item in dataclasses.fields(options)}
        return {name: value for name, value in values.items() if value is not None}
    if not isinstance(options, Mapping):
        raise AdapterOptionsError(
            f"The adapter's options are {type(options).__name__}; expected a mapping, a dataclass or a YAML file."
        )
    return dict(options)


def _variant(adapter: str, given: dict[str, Any]) -> str:
    """The method that `use_dora` and similar flags ask for, if `adapter` allows it."""
    for flag, method in VARIANTS.items():
        if not given.pop(flag, None) or adapter == method:
            continue
        if adapter != "lora":
            raise AdapterOptionsError(
                f"{flag} asks for {method!r} and adapter is {adapter!r}. Delete the line {flag}, or set adapter: "
                f"{method}."
            )
        adapter = method
    return adapter


def _checked_rate(rate: Any, adapter: str) -> float | None:
    if rate is None:
        return None
    if isinstance(rate, bool) or not isinstance(rate, (int, float)) or not 0 < rate < math.inf:
        raise AdapterOptionsError(f"learning_rate in the block of {adapter} is {rate!r}; expected a number above 0.")
    return float(rate)


def _axolotls_all_linear(given: dict[str, Any]) -> None:
    """Replace Axolotl's `lora_target_linear: true` by "all-linear". Unlike Axolotl, PEFT takes no list beside it."""
    if not given.pop("lora_target_linear", None):
        return
    listed = given.pop("target_modules", None) or given.pop("lora_target_modules", None)
    if listed not in (None, [], "all-linear"):
        raise AdapterOptionsError(
            f"lora_target_linear is set and target_modules is {listed!r}; expected one of them. Delete "
            "lora_target_linear and list every module, or delete target_modules."
        )
    given["target_modules"] = "all-linear"


def _own_block(adapter: str, given: dict[str, Any]) -> dict[str, Any]:
    """The method's own options: its block, and `adapter_options` for flat recipes and command lines."""
    own: dict[str, Any] = {}
    for key in (adapter, "adapter_options"):
        block = given.pop(key, None)
        if isinstance(block, str):
            try:
                block = yaml_values(block)  # reads JSON too, a subset of YAML
            except yaml.YAMLError as error:
                raise AdapterOptionsError(f"{key} cannot be read: {error}. Write it as JSON.") from error
        if block is None:
            continue
        if not isinstance(block, Mapping):
            raise AdapterOptionsError(f"{key} is {block!r}; expected a block of {adapter}'s own options, name: value.")
        own |= {str(name): value for name, value in block.items()}
    return own
