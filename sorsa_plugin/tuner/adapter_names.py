"""Refuses names of adapters that torch or PEFT cannot keep, before anything is made."""

from __future__ import annotations

from torch import nn

from ..errors import SORSAConfigError

PARTS = ("sorsa_factors", "weight", "bias")
"""Parts of the names of saved tensors, from which PEFT could not tell the adapter's name."""


def check_adapter_name(name: str) -> None:
    """Check that an adapter can have a name: torch keeps adapters as attributes of an nn.ModuleDict.

    Raises:
        SORSAConfigError: the name is empty, holds a dot, or is taken.
    """
    if not name or "." in name:
        raise SORSAConfigError(f"The adapter's name is {name!r}; expected one without dots, such as 'default'.")
    if hasattr(nn.ModuleDict(), name) or name in PARTS:
        what = "a part of the names of saved tensors" if name in PARTS else "a method or attribute of torch's modules"
        raise SORSAConfigError(f"The adapter's name is {name!r}, which is {what}. Choose another, such as 'my_{name}'.")
