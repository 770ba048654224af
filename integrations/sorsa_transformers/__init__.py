"""SORSA in the Hugging Face Trainer: control, logging, checkpoints."""

from .arguments import AdapterArguments
from .callback import SORSACallback
from .checkpoints import last_complete_checkpoint
from .sharded_checkpoints import convert_checkpoint

__all__ = ["AdapterArguments", "SORSACallback", "convert_checkpoint", "last_complete_checkpoint"]
