"""Gives the layers of a new adapter their triplets, in one process or in several that make the same adapter.

Several processes share the work: each factorises some weights, and all receive the results. So the factors are the same
bits everywhere, whatever the number of processes.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import distributed
from tqdm.auto import tqdm

from ..files.adapter_format import FROZEN
from ..layers.base_weight import base_weight_here
from ..layers.factors import SORSAFactors
from ..layers.layer import SORSALayer
from ..linalg.fingerprint import fingerprint
from ..linalg.svd import Triplets, factorise

if TYPE_CHECKING:
    from ..config import SORSAConfig

SLOW = 2**20
"""Number of elements of a weight from which on a progress bar is worth its line."""


@torch.no_grad()
def initialise_layers(layers: list[SORSALayer], adapter_name: str) -> None:
    """Fill the layers of a new adapter. Layers that await a file, or a weight that no process has, stay as they are.

    In an initialised process group this is a collective, as wrapping a model in DDP is. An adapter that comes from a
    file is the exception: one process may load it alone.

    Raises:
        DecompositionError: see `svd.factorise`.
        FoldError, BaseFilesError, BaseMismatchError: see `qsorsa/residual.py`.
    """
    if all(layer.awaits_file(adapter_name) for layer in layers):
        return
    work = [layer for layer in layers if _must_factorise(layer, adapter_name)]
    residual = any(layer.residual_maker is not None for layer in work)  # each process reads these from a checkpoint
    owners = [] if residual else _owners(work, adapter_name)
    for layer in layers:
        if layer not in work:
            _initialise(layer, adapter_name)
    if owners:  # largest first, so that the layers of a round take about equally long
        work.sort(key=lambda layer: -_size(layer))
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
        if layer.residual_maker is None:
            initialise(layer, adapter_name)
        elif not layer.factors(adapter_name).pending:
            layer.residual_maker.make(layer, adapter_name)


def _initialise_round(team: list[tuple[SORSALayer, int]], adapter_name: str) -> None:
    """Factorise one layer in each owner. A partitioned weight is whole for a moment only, and one process copies it."""
    mine = None
    for layer, owner in team:
        elsewhere = layer.base_matrix().numel() == 0
        with base_weight_here(layer.get_base_layer()):
            if owner == distributed.get_rank():
                mine = layer, layer.base_matrix().clone() if elsewhere else layer.base_matrix()
    if mine is not None:
        initialise(mine[0], adapter_name, mine[1])
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
    """The processes that share the work: those that have the weights, if all processes are about to do the same.

    Empty if each process works alone.
    """
    if not (distributed.is_available() and distributed.is_initialized()) or distributed.get_world_size() == 1:
        return []
    same = [(layer.name, layer.out_features, layer.in_features, layer.factors(adapter_name).rank) for layer in layers]
    everyone: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(everyone, (same, not any(layer.base_matrix().is_meta for layer in layers)))
    if not layers or any(other != same for other, _ in everyone):
        return []
    return [process for process, (_, has_weights) in enumerate(everyone) if has_weights]


def _bar(layers: list[SORSALayer]) -> tqdm:
    """A progress bar on the first process, if the work is slow."""
    slow = any(_size(layer) >= SLOW and _is_here(layer) for layer in layers)
    first = not (distributed.is_available() and distributed.is_initialized()) or distributed.get_rank() == 0
    description = "SORSA: singular triplets"
    return tqdm(total=len(layers), desc=description, unit="layer", disable=not (slow and first), leave=False)


def _is_here(layer: SORSALayer) -> bool:
    """Whether there are weights to work on: `sorsa plan` makes adapters on none."""
    return any(not parameter.is_meta for parameter in layer.get_base_layer().parameters())


def _size(layer: SORSALayer) -> int:
    return math.prod((*layer.stack, layer.out_features, layer.in_features))


def _must_factorise(layer: SORSALayer, adapter_name: str) -> bool:
    """Whether the new adapter needs a factorisation of the weight, here or in a process that has the weight."""
    factors, config = layer.factors(adapter_name), layer.configs[adapter_name]
    cloned = _donor(layer, adapter_name) is not None
    awaited = factors.pending and (config.factors_from_file or not layer.base_weight().is_meta)
    return config.init_weights and not cloned and not awaited


def initialise(layer: SORSALayer, adapter_name: str, matrix: torch.Tensor | None = None) -> None:
    """Fill a new adapter of one layer: clone a sibling's factors if they are the same triplets, else factorise.

    Does nothing to an adapter on the meta device, or one whose tensors are awaited from a file.

    Args:
        layer: the layer.
        adapter_name: the adapter.
        matrix: the base weight (out x in), or a stack of them, if the caller has it at hand.

    Raises:
        DecompositionError: see `svd.factorise`.
        FoldError: the base stores the residual of other triplets.
    """
    factors, config = layer.factors(adapter_name), layer.configs[adapter_name]
    if factors.pending or layer.base_weight().is_meta:
        return
    matrix = layer.base_matrix() if matrix is None else matrix
    if not config.init_weights:
        factors.randomise()
        factors.fingerprint.data.copy_(fingerprint(matrix))
        factors.base_checked = True
        return
    donor = _donor(layer, adapter_name)
    if donor is not None:
        rank = factors.rank
        triplets = Triplets(donor.U0[..., :rank], donor.S0[..., :rank], donor.V0[..., :rank])
        factors.set_initial(triplets, donor.fingerprint)
    else:
        layer.weight_state.refuse_to_factorise(layer, adapter_name)
        factors.set_initial(_triplets(matrix, factors.rank, config, layer.name), fingerprint(matrix))


def _triplets(matrix: torch.Tensor, rank: int, config: SORSAConfig, name: str) -> Triplets:
    options: Any = {"svd": config.svd, "seed": config.svd_seed, "energy": config.resolved_svd_energy}
    if matrix.ndim == 2:
        return factorise(matrix, rank, **options, name=name)
    each = [factorise(expert, rank, **options, name=f"{name}[{i}]") for i, expert in enumerate(matrix)]
    return Triplets(*(torch.stack(parts) for parts in zip(*each, strict=True)))


def _donor(layer: SORSALayer, adapter_name: str) -> SORSAFactors | None:
    """A sibling whose first triplets are those that a factorisation for this adapter would give, or None."""
    rank, config = layer.factors(adapter_name).rank, layer.configs[adapter_name]
    wanted = (config.svd, config.svd_seed, config.resolved_svd_energy)
    for name, sibling in layer.configs.items():
        factors = layer.factors(name)
        options = (sibling.svd, sibling.svd_seed, sibling.resolved_svd_energy)
        same = sibling.init_weights and config.init_weights and options == wanted
        if name != adapter_name and same and factors.rank >= rank and not factors.pending:
            return factors
    return None
