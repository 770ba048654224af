"""Writes a safetensors file one tensor at a time, so that a large adapter is never in memory as a whole."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch


class Entry(NamedTuple):
    """One tensor to come: its name, dtype in the format's spelling ("F32", "BF16", ...), shape and size in bytes."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    size: int


def write_tensors(path: Path, entries: Sequence[Entry], tensors: Iterable[torch.Tensor]) -> int:
    """Write `tensors`, drawn one by one, in the order that `entries` announces.

    Entries of larger elements come first, so that every tensor is aligned.

    Returns:
        The file's size in bytes.

    Raises:
        ValueError: a tensor is not of the announced size, or there are more or fewer of them.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}  # without it transformers refuses the file
    end = 0
    for entry in entries:
        header[entry.name] = {
            "dtype": entry.dtype,
            "shape": list(entry.shape),
            "data_offsets": [end, end + entry.size],
        }
        end += entry.size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for entry, tensor in zip(entries, tensors, strict=True):
            if tensor.nbytes != entry.size:
                raise ValueError(f"{entry.name} has {tensor.nbytes} bytes; {entry.size} were announced.")
            file.write(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        return file.tell()
