"""Which checkpoint of a run can be resumed: the Trainer's own choice is the highest number, complete or not."""

from __future__ import annotations

import json
import re
import zipfile
from os import PathLike
from pathlib import Path

from safetensors import SafetensorError, safe_open

NAME = re.compile(r"checkpoint-(\d+)")


def last_complete_checkpoint(output_dir: str | PathLike[str]) -> str | None:
    """The newest checkpoint of a Trainer's output directory that was saved to its end.

    The Trainer writes trainer_state.json last, and safetensors headers name the length of their file; both are
    checked, so that neither a run killed while saving nor a truncated file is resumed from.

    Args:
        output_dir: the `output_dir` of the training arguments.

    Returns:
        A path for `trainer.train(resume_from_checkpoint=...)`, or None (which starts anew) where there is none.
    """
    directory = Path(output_dir)
    if not directory.is_dir():
        return None
    steps = {int(match[1]): path for path in directory.iterdir() if (match := NAME.fullmatch(path.name))}
    for step in sorted(steps, reverse=True):
        if is_complete(steps[step]):
            return str(steps[step])
    return None


def is_complete(checkpoint: Path) -> bool:
    """Whether a checkpoint directory holds a readable trainer state, weights (safetensors, or FSDP2's shards) and
    optimizer state that are not cut off."""
    try:
        json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
        weights = list(checkpoint.rglob("*.safetensors"))
        for path in weights:
            with safe_open(path, framework="pt"):
                pass
    except (OSError, ValueError, SafetensorError):
        return False
    saved = [path for path in checkpoint.rglob("*.pt") if path.name.startswith(("optimizer", "rng_state"))]
    saved += checkpoint.rglob("*_states.pt")  # DeepSpeed's
    sharded = {path.parent for path in checkpoint.rglob("*.distcp")}
    if not all((directory / ".metadata").is_file() for directory in sharded):  # written when every shard is
        return False
    return bool(weights or sharded) and all(zipfile.is_zipfile(path) for path in saved)
