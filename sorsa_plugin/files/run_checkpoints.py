"""The checkpoint-N directories of a training run, and which of them were saved completely; knows no trainer."""

from __future__ import annotations

import json
import re
import zipfile
from os import PathLike
from pathlib import Path

from safetensors import SafetensorError, safe_open

from .pickled_values import plain_values

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
    may be absent, but not some, nor where training_args.bin says that it wrote them. No file is unpickled.
    """
    try:
        return _has_trainer_state(checkpoint) and _has_weights(checkpoint) and _has_training_states(checkpoint)
    except (OSError, ValueError, TypeError, KeyError, RecursionError, SafetensorError, zipfile.BadZipFile):
        return False


def _has_trainer_state(checkpoint: Path) -> bool:
    state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    return isinstance(state, dict) and type(state.get("global_step")) is int


def _has_weights(checkpoint: Path) -> bool:
    """A safetensors header gives the length of its file, and FSDP2's .metadata those of its shards."""
    weights = list(checkpoint.rglob("*.safetensors"))
    for path in weights:
        with safe_open(path, framework="pt"):
            pass
    for index in checkpoint.rglob("*.safetensors.index.json"):
        shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        if not all((index.parent / shard).is_file() for shard in shards):
            return False
    sharded = {path.parent for path in checkpoint.rglob("*.distcp")}
    return bool(weights or sharded) and all(map(_has_whole_shards, sharded))


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
    return bool(optimizers) or not (schedulers or random or _wrote_states(checkpoint / "training_args.bin"))


def _has_whole_shards(directory: Path) -> bool:
    """Whether every shard that FSDP2's metadata names is there, and as long as what it says lies in it."""
    shard, start = None, 0
    for name, value in plain_values((directory / ".metadata").read_bytes()):
        if name == "relative_path":
            shard, start = directory / str(value), 0
        elif name == "offset":
            start = int(value)
        elif name == "length" and shard is not None and shard.stat().st_size < start + int(value):
            return False
    return shard is not None


def _wrote_states(arguments: Path) -> bool:
    """Whether the training arguments, which nobody needs in order to resume, say that states were saved as well."""
    try:
        return dict(plain_values(_pickle_in(arguments))).get("save_only_model") is False
    except (OSError, ValueError, zipfile.BadZipFile):
        return False


def _is_saved_by_torch(path: Path) -> bool:
    """Whether a file is a whole archive of torch.save: the list of its members, at its end, has an undamaged pickle."""
    return bool(_pickle_in(path))


def _pickle_in(path: Path) -> bytes:
    """The one pickle in an archive of torch.save; nothing if there are none or several."""
    with zipfile.ZipFile(path) as archive:
        pickles = [name for name in archive.namelist() if name.rpartition("/")[2] == "data.pkl"]
        return archive.read(pickles[0]) if len(pickles) == 1 else b""
