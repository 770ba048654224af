"""Makes SORSA a PEFT method: the `PeftType` member and PEFT's own registry, once per process."""

from __future__ import annotations

import warnings
from typing import Any

from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils import PeftType, register_peft_method

NAME = "SORSA"


def add_peft_type() -> None:
    """Add `PeftType.SORSA`. Does nothing when the member exists.

    PEFT's enum is closed and offers no way in; a member of a `str` enum is a `str` with these attributes, listed in
    these tables (CPython's `enum.py`, the same from 3.10 to 3.13). Its name equals its value, so that pickling by
    value finds it in a fresh process that has imported this package.
    """
    if NAME in PeftType.__members__:
        return
    enum_class: Any = PeftType
    member = str.__new__(enum_class, NAME)
    member._name_ = NAME
    member._value_ = NAME
    member.__objclass__ = enum_class
    member._sort_order_ = len(enum_class._member_names_)
    enum_class._member_names_.append(NAME)
    enum_class._member_map_[NAME] = member
    enum_class._value2member_map_[NAME] = member
    type.__setattr__(enum_class, NAME, member)


def register() -> None:
    """Register config and model with PEFT; a second call changes nothing, and a PEFT that ships SORSA itself keeps its
    own, with a warning."""
    from ..config import SORSAConfig
    from .model import SORSAModel

    known = PEFT_TYPE_TO_CONFIG_MAPPING.get(PeftType[NAME])
    if known is None:
        register_peft_method(name=NAME.lower(), config_cls=SORSAConfig, model_cls=SORSAModel)
    elif known is not SORSAConfig:
        warnings.warn(
            f"PEFT already has a method called {NAME} ({known!r}), so sorsa_plugin did not register its own. "
            "Use PEFT's, or a PEFT without it.",
            stacklevel=2,
        )
