"""DeepSpeed ZeRO 1, 2 and 3: the inner torch optimizer steps flat fp32 masters, of which each process has a part.

Reads what DeepSpeed keeps on the parameters (0.18 and 0.19): `_hp_mapping` (ZeRO 1 and 2, `utils/tensor_fragment.py`)
and `ds_tensor`, `_z3_optimizer` (ZeRO 3). A flat tensor is cut anywhere, so a process may hold a part of a row.
DeepSpeed steps one parameter group (ZeRO 1, 2) or sub-group (ZeRO 3) at a time, the same ones on every process.
"""

from __future__ import annotations

import sys
from abc import abstractmethod
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import distributed
from torch.optim.optimizer import Optimizer

from sorsa_plugin.engines import Engine, Share, innermost
from sorsa_plugin.errors import AttachError
from sorsa_plugin.factors import ROUNDED
from sorsa_plugin.regularizer import Factor


class Part(NamedTuple):
    """What this process has of one factor.

    Attributes:
        unit: number of the flat tensor that holds it: a parameter group or a sub-group, alike on every process.
        start, size: elements of the factor, in row-major order.
        cuts: rows that begin in one process and end in another, alike on every process.
    """

    unit: int
    start: int
    size: int
    cuts: tuple[int, ...]


class ZeRO(Engine):
    """What the stages have in common: parts of factors in flat tensors.

    Args:
        optimizer: the torch optimizer inside DeepSpeed's, or None.
        processes: the process group over which it partitions.
    """

    owns_parameters = False

    def __init__(self, optimizer: Optimizer | None, processes: Any) -> None:
        super().__init__(optimizer)
        self.processes = processes
        self.parts: dict[int, Part] = {}
        """By the id of the offset."""

    @abstractmethod
    def holds(self, factor: Factor) -> bool:
        """Whether DeepSpeed's optimizer has masters of the factor."""

    @abstractmethod
    def local_part(self, factor: Factor) -> tuple[int, int, int]:
        """Unit (-1 where this process cannot tell), start and size of this process's part."""

    @abstractmethod
    def master(self, factor: Factor, part: Part) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Value and gradient that the optimizer steps (size), views."""

    @abstractmethod
    def group_of(self, unit: int) -> dict[str, Any] | None:
        """The parameter group of a unit, None where it is not known yet."""

    @abstractmethod
    def units_stepping(self) -> set[int]:
        """The units that the call to `step()` now under way updates."""

    def shares(self, factors: Iterable[Factor]) -> list[Share]:
        return [self._share(factor) for factor in self._located(factors)]

    def stepping(self, factors: Iterable[Factor]) -> list[Share]:
        held, units = self._located(factors), self.units_stepping()
        return [self._share(factor) for factor in held if self.parts[id(factor.offset)].unit in units]

    def begins_step(self) -> bool:
        return not self.parts or min(part.unit for part in self.parts.values()) in self.units_stepping()

    def _share(self, factor: Factor) -> Share:
        part, rank = self.parts[id(factor.offset)], _shape(factor)[1]
        value, gradient = self.master(factor, part)
        initial = _elements(factor, part)
        return Share(
            factor, initial, value, gradient, rank, self.group_of(part.unit), (self.processes,), part.start, part.cuts
        )

    def _located(self, factors: Iterable[Factor]) -> list[Factor]:
        """Those of the factors that are held here; where their parts are is known. A small collective for new ones."""
        held = [factor for factor in factors if self.holds(factor)]
        new = [factor for factor in held if id(factor.offset) not in self.parts]
        if new:
            self._locate(new)
        return held

    def _locate(self, new: list[Factor]) -> None:
        device = _device(new[0])
        mine = torch.tensor([self.local_part(factor) for factor in new], dtype=torch.int64, device=device)
        everyone = [torch.empty_like(mine) for _ in range(distributed.get_world_size(self.processes))]
        distributed.all_gather(everyone, mine, group=self.processes)
        units = torch.stack(everyone)[:, :, 0].amax(0).tolist()
        parts = torch.stack(everyone)[:, :, 1:].tolist()  # process, factor, (start, size)
        for number, (factor, unit) in enumerate(zip(new, units, strict=True)):
            rank = _shape(factor)[1]
            starts = [process[number][0] for process in parts if process[number][1]]
            cuts = tuple(sorted({start // rank for start in starts if start % rank}))
            _, start, size = mine[number].tolist()
            self.parts[id(factor.offset)] = Part(unit, start, size, cuts)


class ZeRO12(ZeRO):
    """ZeRO 1 and 2: the parameters of a group are one flat tensor, and each process steps an equal part of it.

    Also DeepSpeed's bf16 optimizer without ZeRO, which links its masters alike.
    """

    def __init__(self, optimizer: Optimizer | None, processes: Any, factors: list[Factor]) -> None:
        super().__init__(optimizer, processes)
        self._units: list[tuple[dict[str, Any], int]] = []
        """Parameter groups and the units that they are, -1 where they hold no factor."""
        self._locate(factors)
        self._device = factors[0].offset.device
        self._linked = [factor.offset for factor in factors if factor.offset._hp_mapping is not None]  # type: ignore[attr-defined]

    def holds(self, factor: Factor) -> bool:
        return hasattr(factor.offset, "_hp_mapping")

    def local_part(self, factor: Factor) -> tuple[int, int, int]:
        mapping = factor.offset._hp_mapping  # type: ignore[attr-defined]
        if mapping is None:
            return -1, 0, 0
        address = mapping.lp_fragment_address
        return mapping.param_group_index, address.start, address.numel

    def master(self, factor: Factor, part: Part) -> tuple[torch.Tensor, torch.Tensor | None]:
        group = self.group_of(part.unit)
        if not part.size:  # the factor is stepped, but no part of it here
            nothing = torch.empty(0, device=_device(factor))
            return nothing, nothing
        mapping = factor.offset._hp_mapping  # type: ignore[attr-defined]
        gradient = group["params"][0].grad if group is not None else None
        if gradient is not None:
            address = mapping.hp_fragment_address
            gradient = gradient.view(-1).narrow(0, address.start, address.numel)
        return mapping.hp_fragment, gradient

    def group_of(self, unit: int) -> dict[str, Any] | None:
        return next((group for group, found in self._recognised() if found == unit), None)

    def units_stepping(self) -> set[int]:
        return {unit for _, unit in self._recognised()}

    def _recognised(self) -> list[tuple[dict[str, Any], int]]:
        """The optimizer's groups as they are now (DeepSpeed shows one at a time while it steps) and their units: the
        masters of some factor lie in the group's flat tensor, on some process. A small collective for new groups."""
        groups = self.optimizer.param_groups if self.optimizer is not None else []
        known = [next((unit for seen, unit in self._units if seen is group), None) for group in groups]
        new = [group for group, unit in zip(groups, known, strict=True) if unit is None]
        if not new:
            return list(zip(groups, known, strict=True))
        here = [self._unit_in(group["params"]) for group in new]
        found = torch.tensor(here, device=self._device)
        distributed.all_reduce(found, distributed.ReduceOp.MAX, group=self.processes)
        self._units += zip(new, found.tolist(), strict=True)
        return self._recognised()

    def _unit_in(self, flat: list[torch.Tensor]) -> int:
        storages = {tensor.untyped_storage().data_ptr() for tensor in flat if tensor.numel()}
        for offset in self._linked:
            mapping = offset._hp_mapping  # type: ignore[attr-defined]
            if mapping.hp_fragment.untyped_storage().data_ptr() in storages:
                return mapping.param_group_index
        return -1


class ZeRO3(ZeRO):
    """ZeRO 3: every parameter is cut into equal parts, and sub-groups of parts are flat tensors."""

    def __init__(self, optimizer: Optimizer | None, zero: Any) -> None:
        super().__init__(optimizer, zero.dp_process_group)
        self.zero = zero

    def holds(self, factor: Factor) -> bool:
        return getattr(factor.offset, "_z3_optimizer", None) is self.zero

    def local_part(self, factor: Factor) -> tuple[int, int, int]:
        offset: Any = factor.offset
        unit, _, size = self.zero.grad_position[self.zero.get_param_id(offset)]
        start = size * distributed.get_rank(self.processes)
        return unit, min(start, offset.ds_numel), max(0, min(size, offset.ds_numel - start))  # the last ones are padded

    def master(self, factor: Factor, part: Part) -> tuple[torch.Tensor, torch.Tensor | None]:
        unit, start, _ = self.zero.grad_position[self.zero.get_param_id(factor.offset)]
        flat = self.zero.fp32_partitioned_groups_flat[unit]
        gradient = None if flat.grad is None else flat.grad.narrow(0, start, part.size)
        return flat.detach().narrow(0, start, part.size), gradient

    def group_of(self, unit: int) -> dict[str, Any] | None:
        if self.optimizer is None:
            return None
        return self.optimizer.param_groups[self.zero.sub_group_to_group_id[unit]]

    def units_stepping(self) -> set[int]:
        groups = self.optimizer.param_groups if self.optimizer is not None else []
        now = {id(tensor) for group in groups for tensor in group["params"]}
        return {unit for unit, flat in enumerate(self.zero.fp32_partitioned_groups_flat) if id(flat) in now}


def claim(factors: list[Factor], optimizer: Any) -> Engine | None:
    """ZeRO, where the factors are DeepSpeed's and `optimizer` is the one that steps them.

    Raises:
        AttachError: DeepSpeed steps them in a way that does not pass the torch optimizer's `step`.
    """
    inner = innermost(optimizer)
    if inner is not None and not isinstance(inner, Optimizer):
        return None
    offsets: list[Any] = [factor.offset for factor in factors]
    for zero in {id(o._z3_optimizer): o._z3_optimizer for o in offsets if hasattr(o, "_z3_optimizer")}.values():
        if inner is None or inner in (zero.optimizer, getattr(zero, "backup_optimizer", None)):
            return _stage3(zero, inner)
    linked = [factor for factor in factors if hasattr(factor.offset, "_hp_mapping")]
    if linked and (inner is None or _is_flat(inner)):
        offset: Any = linked[0].offset
        engine = ZeRO12(inner, offset._dp_group, linked)
        return engine if inner is None or engine.units_stepping() - {-1} else None
    if inner is not None and "deepspeed" in sys.modules and _is_flat(inner):
        _refuse_unlinked_masters(offsets, inner)
    return None


def _stage3(zero: Any, inner: Optimizer | None) -> Engine:
    if type(zero).__name__ != "DeepSpeedZeroOptimizer_Stage3" or getattr(zero, "partial_offload", 1.0) < 1.0:
        raise AttachError(
            f"DeepSpeed steps the factors through {type(zero).__name__} with a second optimizer, where the regularizer "
            "cannot reach them. Remove SuperOffload, ZenFlow and offload_optimizer.ratio from DeepSpeed's config."
        )
    if getattr(zero, "swap_optimizer", False):
        raise AttachError(
            "DeepSpeed keeps the factors' masters on NVMe, which is not supported with SORSA: set offload_optimizer to "
            "cpu or none. An adapter's state is small."
        )
    return ZeRO3(inner, zero)


def _is_flat(inner: Optimizer) -> bool:
    return all(parameter.dim() == 1 for group in inner.param_groups for parameter in group["params"])


def _refuse_unlinked_masters(offsets: list[Any], inner: Optimizer) -> None:
    owned = {id(parameter) for group in inner.param_groups for parameter in group["params"]}
    if not any(id(offset) in owned for offset in offsets) and any(offset.dtype in ROUNDED for offset in offsets):
        raise AttachError(
            "DeepSpeed without ZeRO keeps flat fp32 masters of 16-bit parameters, where the regularizer cannot reach "
            "the factors. Set zero_optimization.stage to 1 or more in DeepSpeed's config."
        )


def _shape(factor: Factor) -> tuple[int, int]:
    """rows, r."""
    rows, rank = getattr(factor.offset, "ds_shape", factor.offset.shape)
    return rows, rank


def _device(factor: Factor) -> torch.device:
    return getattr(factor.offset, "ds_tensor", factor.offset).device


def _elements(factor: Factor, part: Part) -> torch.Tensor:
    """The same elements of the frozen factor; its parts, where ZeRO 3 partitioned it too, are cut alike."""
    frozen: Any = factor.initial
    if not hasattr(frozen, "ds_tensor"):
        return frozen.detach().reshape(-1).narrow(0, part.start, part.size)
    if frozen.ds_tensor.numel() < part.size:
        raise AttachError(
            f"DeepSpeed keeps the frozen part of {factor.name} on NVMe, which is not supported with SORSA: set "
            "offload_param to cpu or none."
        )
    return frozen.ds_tensor.detach().narrow(0, 0, part.size)
