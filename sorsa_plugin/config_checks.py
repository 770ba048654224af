"""Checks the options that `SORSAConfig` shares with PEFT's other configs.

PEFT iterates over any value that it is given: a string in place of a list selects modules by its letters.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from typing import Any

from .errors import SORSAConfigError

FILLED_IN = ("peft_type", "auto_mapping", "inference_mode", "peft_version", "base_storage", "lora_layouts")
"""Fields of PEFT configs that are filled in, and that no user gives."""


def check_module_options(config: Any) -> None:
    """Check the options that select modules and tokens: their types, and which of them can be combined.

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
    except re.error as error:
        raise SORSAConfigError(
            f"{name} is {value!r}, which is no regular expression ({error}). Correct it, or give a list of names."
        ) from error


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
}
"""{option: (test of a value that is not None, the words for what passes)}."""
