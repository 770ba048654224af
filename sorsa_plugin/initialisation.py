"""Gives the layers of a new adapter their triplets; where several processes make the same adapter, each factorises its
share and all receive the result, so that the factors are the same bits everywhere, whatever the number of processes."""

from __future__ import annotations

from typing import Any

import torch
from torch import distributed
from tqdm.auto import tqdm

from .factors import FROZEN
from .layer import SORSALayer
from .offloading import base_weight_here

SLOW = 2**20
"""Elements of a weight from which on a progress bar is worth its line."""


@torch.no_grad()
def initialise_layers(layers: list[SORSALayer], adapter_name: str) -> None:
    """Fill the layers of a new adapter; those that await a file, or weights, stay as they are.

    In an initialised process group this is a collective, as wrapping a model in DDP is.

    Raises:
        DecompositionError: see `decomposition.factorise`.
    """
    work = [layer for layer in layers if layer.must_factorise(adapter_name)]
    processes = _processes(work, adapter_name)
    for layer in layers:
        if layer not in work:
            _initialise(layer, adapter_name)
    if processes > 1:  # largest first: the layers of a round take equally long
        work.sort(key=lambda layer: -layer.out_features * layer.in_features)
    with _bar(work) as bar:
        for start in range(0, len(work), processes):
            team = work[start : start + processes]
            if processes == 1:
                _initialise(team[0], adapter_name)
            else:
                _initialise_round(team, adapter_name, distributed.get_rank())
            bar.update(len(team))


def _initialise(layer: SORSALayer, adapter_name: str) -> None:
    with base_weight_here(layer.get_base_layer()):
        layer.initialise(adapter_name)


def _initialise_round(layers: list[SORSALayer], adapter_name: str, me: int) -> None:
    """One layer for each process; a partitioned weight is whole for a moment, and its copy on one process only."""
    mine = None
    for owner, layer in enumerate(layers):
        elsewhere = layer.base_matrix().numel() == 0
        with base_weight_here(layer.get_base_layer()):
            if owner == me:
                mine = layer.base_matrix().clone() if elsewhere else layer.base_matrix()
    if me < len(layers):
        layers[me].initialise(adapter_name, mine)
    for owner, layer in enumerate(layers):
        _broadcast([getattr(layer.factors(adapter_name), name) for name in FROZEN], owner)
        layer.factors(adapter_name).base_checked = True


def _broadcast(tensors: list[torch.Tensor], owner: int) -> None:
    """Copy fp32 tensors from one process to all, as one message."""
    flat = torch.cat([tensor.detach().reshape(-1) for tensor in tensors])
    message = flat
    if distributed.get_backend() == "nccl":
        message = flat.to(torch.accelerator.current_accelerator())
    distributed.broadcast(message, owner)
    for tensor, part in zip(tensors, message.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.data.copy_(part.view_as(tensor))


def _processes(layers: list[SORSALayer], adapter_name: str) -> int:
    """How many processes share the work: all, if all are about to do the same."""
    alone = not (distributed.is_available() and distributed.is_initialized()) or distributed.get_world_size() == 1
    if alone:
        return 1
    mine = [(layer.name, layer.out_features, layer.in_features, layer.factors(adapter_name).rank) for layer in layers]
    everyone: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(everyone, mine)
    return len(everyone) if mine and all(other == mine for other in everyone) else 1


def _bar(layers: list[SORSALayer]) -> tqdm:
    """A progress bar where the work is slow, on the first process."""
    slow = any(layer.out_features * layer.in_features >= SLOW for layer in layers)
    first = not (distributed.is_available() and distributed.is_initialized()) or distributed.get_rank() == 0
    description = "SORSA: singular triplets"
    return tqdm(total=len(layers), desc=description, unit="layer", disable=not (slow and first), leave=False)
