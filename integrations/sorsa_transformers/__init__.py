"""SORSA in the Hugging Face Trainer: control, logging, checkpoints."""

from .callback import SORSACallback
from .checkpoints import last_complete_checkpoint

__all__ = ["SORSACallback", "last_complete_checkpoint"]
