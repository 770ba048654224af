"""Writes a safetensors file one tensor at a time, in any order, and continues it after an interruption.

The safetensors library writes a file from tensors that are all in memory; an adapter of a 70B model is 13 GB. Format
(https://huggingface.co/docs/safetensors): 8 bytes with the header's length, a JSON header {name: {dtype, shape,
data_offsets}}, the tensors.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import torch

from ..compat.transformers import str_to_torch_dtype

DTYPE_NAMES = {dtype: name for name, dtype in str_to_torch_dtype.items()}


class TensorFile:
    """The file at `path`: created at its full size, or continued if it exists with the same header.

    Tensors that are never written are zero and, on most file systems, take no space.

    Args:
        path: where the file is.
        layout: {name: tensor of the shape and dtype to come}, for example on the meta device.
    """

    def __init__(self, path: Path, layout: Mapping[str, torch.Tensor]) -> None:
        header, self._start, size = file_header(layout)
        self._layout = layout
        if path.exists() and path.stat().st_size == size and _first_bytes(path, len(header)) == header:
            self._file = path.open("r+b")
            return
        self._file = path.open("w+b")
        self._file.write(header)
        self._file.truncate(size)

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Put a tensor in its place, cast to the dtype laid out for it.

        Raises:
            ValueError: the tensor does not have the shape laid out for it.
        """
        expected = self._layout[name]
        if tensor.shape != expected.shape:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}; the file has {tuple(expected.shape)} for it.")
        self._file.seek(self._start[name])
        flat = tensor.detach().to("cpu", expected.dtype).contiguous().reshape(-1)
        self._file.write(flat.view(torch.uint8).numpy().data)

    def read(self, name: str) -> torch.Tensor:
        """A tensor as the file has it now, in the shape and dtype laid out for it, on the CPU."""
        expected = self._layout[name]
        self._file.seek(self._start[name])
        flat = torch.empty(expected.numel(), dtype=expected.dtype)
        self._file.readinto(flat.view(torch.uint8).numpy().data)
        return flat.reshape(expected.shape)

    def flush(self) -> None:
        """Make everything written so far survive a crash of the machine."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def __enter__(self) -> TensorFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()


def file_header(layout: Mapping[str, torch.Tensor]) -> tuple[bytes, dict[str, int], int]:
    """The header of a safetensors file, {tensor: its offset in the file}, and the file's size in bytes.

    Laid out as the library does (wider dtypes first, then by name), so that both write the same bytes.
    """
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset, offsets = 0, {}
    for name, tensor in sorted(layout.items(), key=lambda item: (-item[1].element_size(), item[0])):
        offsets[name] = offset
        end = offset + tensor.numel() * tensor.element_size()
        entries[name] = {
            "dtype": DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    header = encode_header(entries)
    return header, {name: len(header) + start for name, start in offsets.items()}, len(header) + offset


def encode_header(entries: Mapping[str, object]) -> bytes:
    """The bytes at the beginning of a safetensors file, padded so that the data is aligned and can be mapped."""
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def decode_header(reader: BinaryIO) -> tuple[dict[str, Any], int]:
    """The entries of an open file's header, and the position at which the data begins."""
    length = int.from_bytes(reader.read(8), "little")
    return json.loads(reader.read(length)), 8 + length


def _first_bytes(path: Path, count: int) -> bytes:
    with path.open("rb") as file:
        return file.read(count)
