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


def yaml_values(text: Any) -> Any:
    """The values in YAML or JSON.

    Args:
        text: text, or an open file.

    Raises:
        yaml.YAMLError: it is neither YAML nor JSON.
    """
    return yaml.load(text, _Loader)
