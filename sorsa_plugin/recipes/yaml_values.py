"""Reads YAML in which 4e-4 is a number, as in YAML 1.2 and JSON, and not a word, as in YAML 1.1."""

from __future__ import annotations

import re
from typing import Any

import yaml


class _Loader(yaml.SafeLoader):
    """A safe loader whose numbers need no dot before the exponent."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


LARGEST = 100_000
"""Values in a recipe, with each alias counted as what it stands for. Nine levels of nine aliases would be 4e8."""


def yaml_values(text: Any) -> Any:
    """The values in YAML or JSON.

    Args:
        text: text, or an open file.

    Raises:
        yaml.YAMLError: it is neither YAML nor JSON, or its aliases stand for more than `LARGEST` values.
    """
    try:
        values = yaml.load(text, _Loader)
        count = _count(values, {})
    except (ValueError, TypeError, RecursionError) as error:  # bytes that are no text, impossible dates, deep nesting
        raise yaml.YAMLError(f"it cannot be read ({error!r:.200})") from error
    if count > LARGEST:
        raise yaml.YAMLError(f"its aliases stand for more than {LARGEST:,} values")
    return values


def _count(value: Any, known: dict[int, int]) -> int:
    """The number of values in a value, each list or mapping counted once for every place that holds it."""
    if not isinstance(value, (dict, list)):
        return 1
    if id(value) not in known:
        known[id(value)] = LARGEST + 1  # of a list that holds itself
        parts = value.values() if isinstance(value, dict) else value
        known[id(value)] = 1 + sum(_count(part, known) for part in parts)
    return known[id(value)]
