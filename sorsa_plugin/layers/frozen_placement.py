"""Decides whether an adapter's frozen factors are parameters or buffers; see `factors.py` for why it matters."""

from __future__ import annotations

import os

import torch

from ..plugins import manager


def launched_on_many() -> bool:
    """Whether torchrun, accelerate or a process group has announced several processes, or FSDP on one process."""
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
        return True
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_world_size() > 1
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def frozen_as_parameters() -> bool:
    """Whether frozen factors should be parameters, not buffers: a plug-in's answer, else `launched_on_many()`."""
    answer = manager().hook.sorsa_frozen_as_parameters()
    return launched_on_many() if answer is None else answer
