"""Makes SORSA a PEFT method: the `PeftType` member and PEFT's own registry, once per process."""

from __future__ import annotations

import warnings
from importlib.metadata import version

from packaging.version import Version
from peft.utils import PeftType, register_peft_method

from ..compat.peft import PEFT_TYPE_TO_CONFIG_MAPPING, add_peft_type
from ..compat.transformers import MIN_PEFT_VERSION
from ..config import SORSAConfig
from ..rank_zero import say
from .model import SORSAModel

NAME = "SORSA"


def register() -> None:
    """Add `PeftType.SORSA`, and register config and model with PEFT.

    A second call changes nothing. A PEFT that ships SORSA itself keeps its own, with a warning. Logs a line if
    transformers refuses this PEFT.
    """
    add_peft_type(NAME)
    known = PEFT_TYPE_TO_CONFIG_MAPPING.get(PeftType[NAME])
    if known is None:
        register_peft_method(name=NAME.lower(), config_cls=SORSAConfig, model_cls=SORSAModel)
    elif known is not SORSAConfig:
        warnings.warn(
            f"PEFT already has a method called {NAME} ({known!r}), so sorsa_plugin did not register its own. "
            "Use PEFT's, or a PEFT without it.",
            stacklevel=2,
        )
    conflict = version_conflict()
    if conflict is not None:
        say("%s", conflict)


def version_conflict() -> str | None:
    """A sentence if transformers refuses the PEFT that is installed; pip resolves such pairs."""
    if Version(version("peft")) >= Version(MIN_PEFT_VERSION):
        return None
    return (
        f"transformers {version('transformers')} takes PEFT {MIN_PEFT_VERSION} or newer, and {version('peft')} is "
        "installed: model.add_adapter, model.load_adapter and pipelines on adapters will fail. Run: pip install "
        "'transformers<5.24'"
    )
