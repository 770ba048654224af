"""Copies a base model's directory with some tensors replaced or added, one tensor at a time; knows no adapter.

Shards are written in safetensors' own layout (`safetensors_writer.py`). What is not replaced is copied byte for byte.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, BinaryIO

import torch
from tqdm.auto import tqdm
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME

from .base_checkpoint import OTHER_WEIGHTS, BaseFiles
from .safetensors_writer import decode_header, encode_header

CHUNK = 2**24
"""Bytes copied at a time."""

NOT_COPIED = (*OTHER_WEIGHTS, "adapter_config.json", "adapter_model.*")
"""The same unmerged weights in other formats, and an adapter, which transformers would load on top."""


def copy_weights(
    files: BaseFiles, target: Path, values: Mapping[str, Callable[[], torch.Tensor]], added: Mapping[str, str]
) -> int:
    """Write the shards of a base model and their index into a directory, under the same paths; with a progress bar.

    Args:
        files: the base model.
        target: a directory.
        values, added: as in `copy_shard`, with the shapes and dtypes stored. An added tensor goes into the shard of the
            tensor that it is like.

    Returns:
        Bytes of all tensors written.

    Raises:
        ValueError, EOFError: see `copy_shard`.
    """
    more = {name: files.headers[like].nbytes for name, like in added.items()}
    total = sum(tensor.nbytes for tensor in files.headers.values()) + sum(more.values())
    with tqdm(total=total, desc="SORSA: merging", unit="B", unit_scale=True, disable=total < 2**28) as bar:
        for shard in files.shards:
            here = {name: like for name, like in added.items() if files.shard_of(like) == shard}
            written = target / shard.relative_to(files.directory)
            written.parent.mkdir(parents=True, exist_ok=True)
            copy_shard(shard, written, values, here, bar.update)
    index = files.directory / SAFE_WEIGHTS_INDEX_NAME
    if index.is_file() and not added:
        shutil.copyfile(index, target / index.name)
    elif index.is_file():
        content = json.loads(index.read_text(encoding="utf-8"))
        shards = {name: files.shard_of(like).relative_to(files.directory) for name, like in added.items()}
        content["weight_map"] |= {name: shard.as_posix() for name, shard in shards.items()}
        if "total_size" in content.get("metadata", {}):
            content["metadata"]["total_size"] += sum(more.values())
        (target / index.name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return total


def copy_other_files(files: BaseFiles, target: Path) -> list[str]:
    """Copy all files but weights, card, config and hidden directories.

    Links are followed to where the base's files lie (the hub's cache links all of them to one place), and nowhere else:
    what a stranger's model links to on this machine is not its own.

    Returns:
        The files that were left out; see `NOT_COPIED`.
    """
    left_out = []
    own = {path.resolve().parent for path in (files.directory / CONFIG_NAME, *files.shards)} | {
        files.directory.resolve()
    }
    for path in sorted(files.directory.rglob("*")):
        relative = path.relative_to(files.directory)
        name = relative.as_posix()
        hidden = any(part.startswith(".") for part in relative.parts[:-1])
        written = path in files.shards or name in (CONFIG_NAME, "README.md", SAFE_WEIGHTS_INDEX_NAME)
        if hidden or written or not path.is_file():
            continue
        more_weights = path.parent == files.directory and path.suffix == ".safetensors"
        foreign = not any(place in path.resolve().parents for place in own)
        if foreign or more_weights or any(fnmatch(name, pattern) for pattern in NOT_COPIED):
            left_out.append(name)
            continue
        (target / relative).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target / relative)
    return left_out


def copy_config(files: BaseFiles, target: Path, untied: bool) -> None:
    """Copy config.json; if `untied`, with the change that no word embeddings are tied."""
    content = (files.directory / CONFIG_NAME).read_text(encoding="utf-8")
    if untied:
        config = json.loads(content)
        for part in (config, config.get("text_config")):
            if isinstance(part, dict):
                part["tie_word_embeddings"] = False
        content = json.dumps(config, indent=2) + "\n"
    (target / CONFIG_NAME).write_text(content, encoding="utf-8")


# -- one shard -------------------------------------------------------------------------------------------------------


def copy_shard(
    source: Path,
    target: Path,
    values: Mapping[str, Callable[[], torch.Tensor]],
    added: Mapping[str, str],
    progress: Callable[[int], object],
) -> None:
    """Write `target` as a copy of `source` with other values.

    Args:
        source: a whole safetensors file.
        target: the file to make.
        values: {name: function that makes the tensor}. Each function is called when its tensor is to be written, one
            after the other. Its tensor has the dtype and shape stored; for an added name, those of the tensor that it
            is like.
        added: {new name: name of the stored tensor that it is like}. It takes that tensor's dtype and shape, and its
            value too unless `values` has one.
        progress: called with the number of bytes written.

    Raises:
        ValueError: a new tensor does not have the stored number of bytes.
        EOFError: `source` is cut off.
    """
    with source.open("rb") as reader, target.open("xb") as writer:
        stored, start = decode_header(reader)
        header: dict[str, Any] = dict(stored)
        end = max((entry["data_offsets"][1] for name, entry in stored.items() if name != "__metadata__"), default=0)
        for name, like in added.items():
            begin, end = end, end + _length(stored[like])
            header[name] = {**stored[like], "data_offsets": [begin, end]}
        writer.write(encode_header(header))
        tensors = {name: entry for name, entry in header.items() if name != "__metadata__"}
        for name, entry in sorted(tensors.items(), key=lambda item: item[1]["data_offsets"]):
            if name in values:
                _write_tensor(writer, values[name](), name, _length(entry))
            else:
                reader.seek(start + stored[added.get(name, name)]["data_offsets"][0])
                _copy(reader, writer, _length(entry))
            progress(_length(entry))


def _length(entry: dict[str, Any]) -> int:
    begin, end = entry["data_offsets"]
    return end - begin


def _write_tensor(writer: BinaryIO, tensor: torch.Tensor, name: str, length: int) -> None:
    data = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data
    if len(data) != length:
        raise ValueError(f"{name} takes {length} bytes, and {len(data)} were given to write ({tensor.dtype}).")
    writer.write(data)


def _copy(reader: BinaryIO, writer: BinaryIO, length: int) -> None:
    while length:
        data = reader.read(min(CHUNK, length))
        if not data:
            raise EOFError(f"{reader.name} ended {length} bytes early.")
        writer.write(data)
        length -= len(data)
