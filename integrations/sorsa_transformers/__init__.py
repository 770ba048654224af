"""SORSA in the Hugging Face Trainer: control, logging, checkpoints."""

from .arguments import AdapterArguments
from .callback import SORSACallback
from .checkpoints import last_complete_checkpoint

__all__ = ["AdapterArguments", "SORSACallback", "last_complete_checkpoint"]
