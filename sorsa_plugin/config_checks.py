"""Checks the options that `SORSAConfig` shares with PEFT's other configs.

PEFT iterates over any value that it is given: a string in place of a list selects modules by its letters.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from os import PathLike
from typing import Any

from .errors import SORSAConfigError

FILLED_IN = (
    *("peft_type", "auto_mapping", "inference_mode", "peft_version"),
    *("base_storage", "lora_layouts", "adapted_layers"),
)
"""Fields of PEFT configs that are filled in, and that no user gives."""


def check_module_options(config: Any) -> None:
    """Check the types of options, those that are filled in too, and which that select modules can be combined.

    Args:
        config: a config with the fields in `EXPECTED`.

    Raises:
        SORSAConfigError: one of them cannot be honoured.
    """
    for name, (fits, expected) in EXPECTED.items():
        value = getattr(config, name)
        if value is not None and not fits(value):
            raise SORSAConfigError(f"{name} is {value!r}; expected {expected}.")
    for name in ("target_modules", "exclude_modules"):
        _check_expression(name, getattr(config, name))
    for name in ("rank_pattern", "modules_to_save"):  # PEFT matches these too
        for pattern in getattr(config, name) or ():
            _check_expression(f"{name} has an entry that", pattern)
    if isinstance(config.target_modules, str) and config.layers_to_transform is not None:
        raise SORSAConfigError(
            "`layers_to_transform` cannot be used when `target_modules` is a str: got "
            f"target_modules={config.target_modules!r}. Give a list of names, or select layers in the expression."
        )
    if isinstance(config.target_modules, str) and config.layers_pattern is not None:
        raise SORSAConfigError(
            "`layers_pattern` cannot be used when `target_modules` is a str: got "
            f"target_modules={config.target_modules!r}. Give a list of names, or select layers in the expression."
        )
    if config.layers_pattern and config.layers_to_transform is None:
        raise SORSAConfigError(
            "When `layers_pattern` is specified, `layers_to_transform` must also be specified. "
            f"Got layers_pattern={config.layers_pattern!r} alone: add the layer indices or drop the pattern."
        )


def _check_expression(name: str, value: Any) -> None:
    if not isinstance(value, str):
        return
    try:
        re.compile(value)
    except (re.error, RecursionError, OverflowError) as error:
        raise SORSAConfigError(
            f"{name} is {value!r}, which is no regular expression ({error}). Correct it, or give a list of names."
        ) from error


def is_layout(value: Any) -> bool:
    """Whether a value is an entry of `lora_layouts`: a kind that is known, with its details."""
    if not isinstance(value, (list, tuple)) or not value or not isinstance(value[0], str):
        return False
    kind, *details = value
    if kind == "convolution":
        return len(details) > 1 and all(_is_index(detail) and detail > 0 for detail in details)
    texts = {"embedding": 0, "weight": 0, "parameter": 1, "tied": 1, "unsupported": 1}
    return len(details) == texts.get(kind) and all(map(_is_text, details))


def _is_switch(value: Any) -> bool:
    return isinstance(value, bool)


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_path(value: Any) -> bool:
    return isinstance(value, (str, PathLike))


def _is_table(value: Any, fits: Callable[[Any], bool]) -> bool:
    return isinstance(value, Mapping) and _are_names(list(value)) and all(map(fits, value.values()))


def _is_index(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _are(fits: Callable[[Any], bool], values: Any) -> bool:
    """Whether `values` is a list, tuple, set or similar whose members all fit."""
    return isinstance(values, Collection) and not isinstance(values, (str, Mapping)) and all(map(fits, values))


def _are_names(value: Any) -> bool:
    return _are(lambda name: isinstance(name, str), value)


def _are_names_or_one(value: Any) -> bool:
    return isinstance(value, str) or _are_names(value)


def _are_indices(value: Any) -> bool:
    return _are(_is_index, value)


def _are_tokens(value: Any) -> bool:
    if isinstance(value, Mapping):
        return _are_names(list(value)) and all(map(_are_indices, value.values()))
    return _are_indices(value)


EXPECTED: dict[str, tuple[Callable[[Any], bool], str]] = {
    "target_modules": (_are_names_or_one, 'a list of module names, a regular expression, or "all-linear"'),
    "target_parameters": (
        _are_names,
        'a list of names such as ["mlp.experts.down_proj"]; PEFT matches no regular expression here',
    ),
    "exclude_modules": (_are_names_or_one, "a list of module names or a regular expression"),
    "modules_to_save": (_are_names, 'a list of module names such as ["lm_head"]'),
    "layers_to_transform": (lambda value: _is_index(value) or _are_indices(value), "a layer index or a list of them"),
    "layers_pattern": (_are_names_or_one, "the name of a layer list, or a list of them"),
    "trainable_token_indices": (_are_tokens, "a list of token indices, or {embedding's name: such a list}"),
    "rank_pattern": (
        lambda value: isinstance(value, Mapping) and _are_names(list(value)),
        "{module name or regular expression: rank}",
    ),
    "fan_in_fan_out": (_is_switch, "True or False"),
    "ensure_weight_tying": (_is_switch, "True or False"),
    "inference_mode": (_is_switch, "True or False"),
    "full_precision_base": (_is_path, "a directory or an id on the hub"),
    "base_model_name_or_path": (_is_path, "a directory or an id on the hub"),
    "revision": (_is_text, "a revision's name"),
    "auto_mapping": (
        lambda value: _is_table(value, lambda entry: entry is None or _is_text(entry)),
        "{base_model_class and parent_library: names}",
    ),
    "base_storage": (lambda value: _is_text(value) or _is_table(value, _is_text), "a storage, or {layer: storage}"),
    "lora_layouts": (
        lambda value: _is_table(value, is_layout),
        "{layer: layout}, with layouts as files/adapter_format.py lists them",
    ),
    "adapted_layers": (lambda value: _is_table(value, _is_index), "{layout: number of layers}"),
}
"""{option: (test of a value that is not None, the words for what passes)}."""
