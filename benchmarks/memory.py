"""Memory of a training step: what a forward keeps for backward, and the peak of live tensors."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def saved_activations(forward: Callable[[], Any], module: nn.Module) -> int:
    """Bytes that a forward keeps for backward, parameters and buffers of the module left out."""
    own = {t.untyped_storage().data_ptr() for t in (*module.parameters(), *module.buffers())}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = forward()  # alive until the end, so that no address is counted for two tensors
    del output
    return sum(kept.values())


def peak_memory(step: Callable[[], Any], device: str) -> int:
    """Most bytes of tensors alive during a call beyond those alive before it.

    On the CPU autograd adds gradients out of place while it is watched, so that a step seems to need one input
    gradient more than it does, whatever the method.
    """
    step()
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return torch.cuda.max_memory_allocated() - before
    with _LiveTensors() as live:
        step()
    return live.peak


class _LiveTensors(TorchDispatchMode):
    """Adds up, after every operator, the storages that operators have made and that are still alive."""

    def __init__(self) -> None:
        super().__init__()
        self.live: dict[StorageWeakRef, int] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = {StorageWeakRef(tensor.untyped_storage()) for tensor in _tensors((args, kwargs))}
        result = func(*args, **kwargs)
        for tensor in _tensors(result):
            reference = StorageWeakRef(tensor.untyped_storage())
            if reference not in given:
                self.live.setdefault(reference, tensor.untyped_storage().nbytes())
        self.live = {reference: size for reference, size in self.live.items() if not reference.expired()}
        self.peak = max(self.peak, sum(self.live.values()))
        return result


def _tensors(values: Any) -> list[torch.Tensor]:
    return [value for value in tree_leaves(values) if isinstance(value, torch.Tensor)]
