"""The checkpoint-N directories of a training run, and which of them were saved completely; knows no trainer."""

from __future__ import annotations

import json
import re
import zipfile
from os import PathLike
from pathlib import Path

from safetensors import SafetensorError, safe_open

NAME = re.compile(r"checkpoint-(\d+)")


def checkpoints(output_dir: str | PathLike[str]) -> dict[int, Path]:
    """{step: directory} of a run's output directory, in the order of the steps; complete or not."""
    directory = Path(output_dir)
    if not directory.is_dir():
        return {}
    found = {int(match[1]): path for path in directory.iterdir() if (match := NAME.fullmatch(path.name))}
    return dict(sorted(found.items()))


def is_complete(checkpoint: Path) -> bool:
    """Whether a checkpoint directory holds a readable trainer state, weights, and optimizer state that is not cut off.

    Weights are safetensors, or FSDP2's shards. The Trainer writes trainer_state.json last, and a safetensors header
    gives the length of its file.
    """
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
    if not all((directory / ".metadata").is_file() for directory in sharded):  # written after every shard
        return False
    return bool(weights or sharded) and all(zipfile.is_zipfile(path) for path in saved)
