"""SORSA in the Hugging Face Trainer: control, logging, checkpoints."""

from sorsa_distributed import convert_checkpoint

from .arguments import AdapterArguments
from .callback import SORSACallback
from .checkpoints import last_complete_checkpoint

__all__ = ["AdapterArguments", "SORSACallback", "convert_checkpoint", "last_complete_checkpoint"]
