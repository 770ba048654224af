"""JSON: turns Python values into its types, for every report, and knows how reading a stranger's values fails."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

UNREADABLE = (
    ValueError,
    TypeError,
    KeyError,
    IndexError,
    AttributeError,
    RecursionError,
    OverflowError,
    RuntimeError,
)
"""What values of the wrong type or size end in, in the code of PEFT, transformers and torch that reads them."""


def json_values(value: Any) -> Any:
    """The value in JSON's types.

    Numbers that are not finite become None (JSON has no NaN or infinity), sets become sorted lists, and types that JSON
    does not know become text.
    """
    if isinstance(value, Mapping):
        return {str(key): json_values(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [json_values(entry) for entry in value]
    if isinstance(value, (set, frozenset)):
        return sorted(json_values(entry) for entry in value)
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, (str, int)) else str(value)
