"""SORSA in the Hugging Face Trainer: control, logging, checkpoints.

What a name needs is imported when it is first used, because `sorsa sft --help` lists the fields of `AdapterArguments`.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sorsa_distributed import convert_checkpoint

    from .arguments import AdapterArguments
    from .callback import SORSACallback
    from .checkpoints import last_complete_checkpoint

__all__ = ["AdapterArguments", "SORSACallback", "convert_checkpoint", "last_complete_checkpoint"]

_ROOMS = {
    "AdapterArguments": "sorsa_transformers.arguments",
    "SORSACallback": "sorsa_transformers.callback",
    "convert_checkpoint": "sorsa_distributed",
    "last_complete_checkpoint": "sorsa_transformers.checkpoints",
}


def __getattr__(name: str) -> Any:
    if name not in _ROOMS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_ROOMS[name]), name)
