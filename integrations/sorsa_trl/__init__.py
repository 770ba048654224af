"""SORSA in TRL: trainers that report the regularized loss, and `sorsa sft` and `sorsa dpo`.

TRL is imported when one of these names is first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .loss import OrthonormalLoss, with_orthonormal_loss
    from .trainers import SORSADPOTrainer, SORSASFTTrainer

__all__ = ["OrthonormalLoss", "SORSADPOTrainer", "SORSASFTTrainer", "with_orthonormal_loss"]

_ROOMS = {
    "OrthonormalLoss": "loss",
    "with_orthonormal_loss": "loss",
    "SORSASFTTrainer": "trainers",
    "SORSADPOTrainer": "trainers",
}


def __getattr__(name: str) -> Any:
    from importlib import import_module

    if name not in _ROOMS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_ROOMS[name]}", __name__), name)
