"""SORSA on several processes: FSDP2 and DeepSpeed ZeRO 1 to 3, and the checkpoints that they write in pieces.

Needs torch, and DeepSpeed only if it is used; knows no trainer. Both are imported when a name is first used, because
`sorsa --help` imports the command.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .sharded_checkpoints import complete_sharded_checkpoint, convert_checkpoint

__all__ = ["complete_sharded_checkpoint", "convert_checkpoint"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from . import sharded_checkpoints

    return getattr(sharded_checkpoints, name)
