"""Looks into the metadata of FSDP2's shards before torch reads it: a pickle can run what a stranger put into it.

`torch.distributed.checkpoint` unpickles `.metadata`, and every entry that is no tensor. Tensors it reads safely.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import BytesStorageMetadata

from sorsa_plugin.errors import ForeignAdapterError

KNOWN_MODULES = ("torch.distributed.checkpoint.metadata",)
"""Modules of which the metadata may hold any class; they define plain records."""

KNOWN_NAMES = {
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.serialization", "_get_layout"),
    ("torch", "Size"),
    ("collections", "OrderedDict"),
    ("pathlib", "PosixPath"),
    ("pathlib", "WindowsPath"),
}
"""What else torch 2.6 to 2.13 writes there, beside dtypes."""


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if (module in KNOWN_MODULES and "." not in name) or (module, name) in KNOWN_NAMES or is_dtype:
            return super().find_class(module, name)
        raise ForeignAdapterError(f"names {module}.{name}")


def require_tensors_alone(shards: Path) -> None:
    """Check that reading a directory of shards runs no code: its metadata holds torch's records, and only tensors.

    Raises:
        ForeignAdapterError: it names something else, or holds pickled objects.
        OSError: there is no metadata.
        ValueError: it is damaged.
    """
    path = shards / ".metadata"
    remedy = "Reading it could run code of whoever made it. Take the checkpoint from the original run again."
    try:
        with path.open("rb") as file:
            metadata = _Unpickler(file).load()
    except ForeignAdapterError as error:
        raise ForeignAdapterError(f"{path} {error}; expected torch's own records of tensors. {remedy}") from error
    except (pickle.UnpicklingError, EOFError, AttributeError, ImportError, IndexError, TypeError) as error:
        raise ValueError(f"{path} is damaged: {error!r}") from error
    entries = getattr(metadata, "state_dict_metadata", {})
    pickled = [name for name, entry in entries.items() if isinstance(entry, BytesStorageMetadata)]
    if pickled:
        raise ForeignAdapterError(
            f"{path} lists {pickled[0]}, which is stored as a pickled object; expected tensors alone. {remedy}"
        )
