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
    """Whether a checkpoint directory holds every file that the Trainer reads to resume, none of them cut off.

    These are trainer_state.json, which the Trainer writes last; the weights (safetensors, or FSDP2's shards); and the
    states of optimizer, scheduler and random numbers. A run with save_only_model writes none of these states, so all
    may be absent, but not some. No file is unpickled.
    """
    try:
        return _has_trainer_state(checkpoint) and _has_weights(checkpoint) and _has_training_states(checkpoint)
    except (OSError, ValueError, TypeError, KeyError, RecursionError, SafetensorError, zipfile.BadZipFile):
        return False


def _has_trainer_state(checkpoint: Path) -> bool:
    state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    return isinstance(state, dict) and type(state.get("global_step")) is int


def _has_weights(checkpoint: Path) -> bool:
    """A safetensors header gives the length of its file; FSDP2's .metadata is written after every shard."""
    weights = list(checkpoint.rglob("*.safetensors"))
    for path in weights:
        with safe_open(path, framework="pt"):
            pass
    for index in checkpoint.rglob("*.safetensors.index.json"):
        shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        if not all((index.parent / shard).is_file() for shard in shards):
            return False
    sharded = {path.parent for path in checkpoint.rglob("*.distcp")}
    return bool(weights or sharded) and all(_is_filled(directory / ".metadata") for directory in sharded)


def _has_training_states(checkpoint: Path) -> bool:
    latest = checkpoint / "latest"  # DeepSpeed's; it names a folder
    partitions = list(checkpoint.rglob("*_states.pt"))
    if latest.is_file() and not any(
        path.parent.name == latest.read_text(encoding="utf-8").strip() for path in partitions
    ):
        return False
    plain = [path for name in ("optimizer.pt", "optimizer.bin") if (path := checkpoint / name).is_file()]
    optimizers = [*plain, *partitions, *checkpoint.glob("optimizer_*/*.distcp")]
    schedulers = [path for path in (checkpoint / "scheduler.pt",) if path.is_file()]
    random = list(checkpoint.glob("rng_state*.pth"))
    scalers = list(checkpoint.glob("scaler.pt"))
    if not all(map(_is_saved_by_torch, (*plain, *partitions, *schedulers, *random, *scalers))):
        return False
    if plain:
        return bool(schedulers and random)
    return bool(optimizers) or not (schedulers or random)


def _is_filled(path: Path) -> bool:
    return path.is_file() and path.stat().st_size > 0


def _is_saved_by_torch(path: Path) -> bool:
    """Whether a file is a whole archive of torch.save: the list of its members, at its end, has an undamaged pickle."""
    with zipfile.ZipFile(path) as archive:
        pickles = [name for name in archive.namelist() if name.rpartition("/")[2] == "data.pkl"]
        return len(pickles) == 1 and bool(archive.read(pickles[0]))
