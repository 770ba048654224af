"""FSDP2 (`fully_shard`): parameters and reduced gradients are DTensors of whole rows, and the optimizer owns them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch.distributed.tensor import DTensor
from torch.optim.optimizer import Optimizer

from sorsa_plugin.errors import AttachError
from sorsa_plugin.extend import Engine, Factor, Share, groups_by_parameter, innermost


class FSDP2(Engine):
    """Each process steps some rows of every factor."""

    def owns(self, factor: Factor) -> bool:
        return self.optimizer is None or id(factor.offset) in groups_by_parameter(self.optimizer)

    def shares(self, factors: Iterable[Factor]) -> list[Share]:
        """See `Engine.shares`.

        Raises:
            AttachError: columns are sharded, or a frozen factor is sharded otherwise than its offset.
        """
        groups = groups_by_parameter(self.optimizer)
        return [
            _share(factor, group)
            for factor in factors
            if (group := groups.get(id(factor.offset))) is not None or self.optimizer is None
        ]


def _share(factor: Factor, group: dict[str, Any] | None) -> Share:
    offset: Any = factor.offset
    gradient = None if offset.grad is None else _local(offset.grad)
    rank = offset.shape[1]
    return Share(factor.name, _local(factor.initial), _local(offset), gradient, rank, group, _process_groups(factor))


def _local(tensor: Any) -> Any:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _process_groups(factor: Factor) -> tuple[Any, ...]:
    """The groups over which rows are sharded.

    Raises:
        AttachError: columns are sharded, or the frozen factor is sharded otherwise than its offset.
    """
    placements = getattr(factor.offset, "placements", ())
    frozen = getattr(factor.initial, "placements", ())
    stacked = factor.offset.ndim == 3
    if any(placement.is_shard() and (stacked or not placement.is_shard(0)) for placement in placements):
        raise AttachError(
            f"{factor.name} of shape {tuple(factor.offset.shape)} is sharded as {placements}; expected row shards "
            "(FSDP2's Shard(0)) of a matrix. Tensor-parallel plans over SORSA factors, and sharded stacks of experts, "
            "are not supported: keep them out of the plan, or train them with DDP."
        )
    if placements != frozen and any(placement.is_shard() for placement in (*placements, *frozen)):
        raise AttachError(
            f"The trained part of {factor.name} is sharded as {placements or 'a whole tensor'} and the frozen part as "
            f"{frozen or 'a whole tensor'}; expected both alike. Launch with torchrun or accelerate, which announce "
            "themselves before get_peft_model(), and leave no part of the adapter out of fully_shard."
        )
    mesh: Any = getattr(factor.offset, "device_mesh", None)
    return tuple(mesh.get_group(i) for i, placement in enumerate(placements) if placement.is_shard(0))


def claim(factors: list[Factor], optimizer: Any) -> Engine | None:
    """FSDP2, if the factors that the optimizer owns are DTensors, else None."""
    inner = innermost(optimizer)
    groups = groups_by_parameter(inner) if isinstance(inner, Optimizer) else {}
    sharded = [f for f in factors if isinstance(f.offset.data, DTensor) and (inner is None or id(f.offset) in groups)]
    return FSDP2(inner) if sharded else None
