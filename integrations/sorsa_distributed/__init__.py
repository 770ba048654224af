"""SORSA on several processes: FSDP2 and DeepSpeed ZeRO 1 to 3, and the checkpoints that they write in pieces.

Needs torch, and DeepSpeed only if it is used; knows no trainer.
"""

from .sharded_checkpoints import complete_sharded_checkpoint, convert_checkpoint

__all__ = ["complete_sharded_checkpoint", "convert_checkpoint"]
