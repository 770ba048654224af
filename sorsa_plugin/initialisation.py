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
    """Fill the layers of a new adapter; those that await a file, or a weight that no process has, stay as they are.

    In an initialised process group this is a collective, as wrapping a model in DDP is.

    Raises:
        DecompositionError: see `decomposition.factorise`.
    """
    work = [layer for layer in layers if layer.must_factorise(adapter_name)]
    owners = _owners(work, adapter_name)
    for layer in layers:
        if layer not in work:
            _initialise(layer, adapter_name)
    if owners:  # largest first: the layers of a round take equally long
        work.sort(key=lambda layer: -layer.out_features * layer.in_features)
    with _bar(work) as bar:
        for start in range(0, len(work), max(1, len(owners))):
            team = work[start : start + max(1, len(owners))]
            if owners:
                _initialise_round(list(zip(team, owners, strict=False)), adapter_name)
            else:
                _initialise(team[0], adapter_name)
            bar.update(len(team))


def _initialise(layer: SORSALayer, adapter_name: str) -> None:
    with base_weight_here(layer.get_base_layer()):
        layer.initialise(adapter_name)


def _initialise_round(team: list[tuple[SORSALayer, int]], adapter_name: str) -> None:
    """One layer for each owner; a partitioned weight is whole for a moment, and its copy in one process only."""
    mine = None
    for layer, owner in team:
        elsewhere = layer.base_matrix().numel() == 0
        with base_weight_here(layer.get_base_layer()):
            if owner == distributed.get_rank():
                mine = layer, layer.base_matrix().clone() if elsewhere else layer.base_matrix()
    if mine is not None:
        mine[0].initialise(adapter_name, mine[1])
    for layer, owner in team:
        factors = layer.factors(adapter_name)
        if factors.pending:  # this process has no weight
            factors.materialise(torch.device("cpu"))
            factors.zero_offsets()
        _broadcast([getattr(factors, name) for name in FROZEN], owner)
        factors.base_checked = True


def _broadcast(tensors: list[torch.Tensor], owner: int) -> None:
    """Copy fp32 tensors from one process to all, as one message."""
    message = torch.cat([tensor.detach().reshape(-1) for tensor in tensors])
    if distributed.get_backend() == "nccl":
        message = message.to(torch.accelerator.current_accelerator())
    distributed.broadcast(message, owner)
    for tensor, part in zip(tensors, message.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.data.copy_(part.view_as(tensor))


def _owners(layers: list[SORSALayer], adapter_name: str) -> list[int]:
    """The processes that share the work: those that have the weights, if all processes are about to do the same; none
    where each is on its own."""
    if not (distributed.is_available() and distributed.is_initialized()) or distributed.get_world_size() == 1:
        return []
    same = [(layer.name, layer.out_features, layer.in_features, layer.factors(adapter_name).rank) for layer in layers]
    everyone: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(everyone, (same, not any(layer.base_matrix().is_meta for layer in layers)))
    if not layers or any(other != same for other, _ in everyone):
        return []
    return [process for process, (_, has_weights) in enumerate(everyone) if has_weights]


def _bar(layers: list[SORSALayer]) -> tqdm:
    """A progress bar where the work is slow, on the first process."""
    slow = any(layer.out_features * layer.in_features >= SLOW for layer in layers)
    first = not (distributed.is_available() and distributed.is_initialized()) or distributed.get_rank() == 0
    description = "SORSA: singular triplets"
    return tqdm(total=len(layers), desc=description, unit="layer", disable=not (slow and first), leave=False)
