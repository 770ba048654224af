"""DeepSpeed ZeRO 1, 2 and 3: the inner torch optimizer steps flat fp32 masters, of which each process has a part.

What DeepSpeed keeps on parameters and optimizers is listed in `deepspeed_compat.py`. A flat tensor is cut anywhere, so
a process may hold a part of a row. DeepSpeed steps one parameter group (ZeRO 1, 2) or sub-group (ZeRO 3) at a time,
the same ones on every process.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import distributed
from torch.optim.optimizer import Optimizer

from sorsa_plugin.errors import AttachError
from sorsa_plugin.extend import ROUNDED, Engine, Factor, Share, groups_by_parameter, innermost

from ..deepspeed_compat import STAGE_3_CLASS, STAGE_12_CLASS, is_linked, is_loaded, stage3_of, zero_driving


class Part(NamedTuple):
    """The part of one factor that this process has.

    Attributes:
        unit: number of the flat tensor that holds it: a parameter group or a sub-group, the same on every process.
        start, size: elements of the factor, in row-major order.
        cuts: rows that begin in one process and end in another, the same on every process.
    """

    unit: int
    start: int
    size: int
    cuts: tuple[int, ...]


class ZeRO(Engine):
    """What the stages share: parts of factors in flat tensors.

    Args:
        optimizer: the torch optimizer inside DeepSpeed's, or None.
        processes: the process group over which it partitions.
    """

    owns_parameters = False

    def __init__(self, optimizer: Optimizer | None, processes: Any) -> None:
        super().__init__(optimizer)
        self.processes = processes
        self.parts: dict[int, Part] = {}
        """{id of the offset: its part}"""

    @abstractmethod
    def unit_of(self, factor: Factor) -> int | None:
        """Number of the flat tensor that has the factor's master; None if another optimizer steps it."""

    @abstractmethod
    def local_part(self, factor: Factor) -> tuple[int, int]:
        """Start and size of this process's part, in elements."""

    @abstractmethod
    def master(self, factor: Factor, part: Part) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Value and gradient (n, with n = `part.size`) that the optimizer steps, fp32 views; no gradient: None."""

    @abstractmethod
    def group_of(self, unit: int) -> dict[str, Any] | None:
        """The parameter group of a unit; None if it is not known yet."""

    @abstractmethod
    def units_stepping(self) -> set[int]:
        """The units that the current call to `step()` updates."""

    def owns(self, factor: Factor) -> bool:
        return self.unit_of(factor) is not None

    def shares(self, factors: Iterable[Factor]) -> list[Share]:
        """See `Engine.shares`. Every process has to call this: they exchange the places of new factors."""
        return [self._share(factor) for factor in self._located(factors)]

    def stepping(self, factors: Iterable[Factor]) -> list[Share]:
        held, units = self._located(factors), self.units_stepping()
        return [self._share(factor) for factor in held if self.parts[id(factor.offset)].unit in units]

    def begins_step(self) -> bool:
        """Whether the current call to `step()` updates the first of the units with factors."""
        return not self.parts or min(part.unit for part in self.parts.values()) in self.units_stepping()

    def _share(self, factor: Factor) -> Share:
        part, rank = self.parts[id(factor.offset)], _shape(factor)[1]
        value, gradient = self.master(factor, part)
        initial = factor.initial.detach().reshape(-1).narrow(0, part.start, part.size)
        return Share(
            factor.name,
            initial,
            value,
            gradient,
            rank,
            self.group_of(part.unit),
            (self.processes,),
            part.start,
            part.cuts,
        )

    def _located(self, factors: Iterable[Factor]) -> list[Factor]:
        """The factors that this engine holds, with the places of their parts known; a small collective for new ones."""
        held = [factor for factor in factors if self.owns(factor)]
        new = [factor for factor in held if id(factor.offset) not in self.parts]
        if new:
            self._locate(new)
        return held

    def _locate(self, new: list[Factor]) -> None:
        device = new[0].initial.device  # DeepSpeed may keep the offset on the CPU, where nothing can be exchanged
        mine = torch.tensor([self.local_part(factor) for factor in new], dtype=torch.int64, device=device)
        everyone = [torch.empty_like(mine) for _ in range(distributed.get_world_size(self.processes))]
        distributed.all_gather(everyone, mine, group=self.processes)
        places = torch.stack(everyone, dim=1).tolist()  # factor, process, (start, size)
        for factor, (start, size), everywhere in zip(new, mine.tolist(), places, strict=True):
            rank, unit = _shape(factor)[1], self.unit_of(factor)
            assert unit is not None
            cuts = tuple(sorted({start // rank for start, size in everywhere if size and start % rank}))
            self.parts[id(factor.offset)] = Part(unit, start, size, cuts)


class ZeRO12(ZeRO):
    """ZeRO 1 and 2: the parameters of a group are one flat tensor, and each process steps an equal part of it."""

    def __init__(self, optimizer: Optimizer, zero: Any) -> None:
        super().__init__(optimizer, zero.real_dp_process_group[0])
        self.zero = zero
        self.units = {id(p): unit for unit, group in enumerate(zero.bit16_groups) for p in group}
        self.groups: dict[int, dict[str, Any]] = {}

    def unit_of(self, factor: Factor) -> int | None:
        return self.units.get(id(factor.offset))

    def local_part(self, factor: Factor) -> tuple[int, int]:
        mapping = _mapping(factor)
        return (mapping.lp_fragment_address.start, mapping.lp_fragment_address.numel) if mapping else (0, 0)

    def master(self, factor: Factor, part: Part) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Value and gradient (n) of this process's part; two empty tensors if no part of the factor is here."""
        mapping, gradient = _mapping(factor), self.zero.single_partition_of_fp32_groups[part.unit].grad
        if mapping is None:  # other processes step all of the factor
            nothing = torch.empty(0, device=factor.offset.device)
            return nothing, nothing
        if gradient is not None:
            gradient = gradient.view(-1).narrow(0, mapping.hp_fragment_address.start, part.size)
        return mapping.hp_fragment, gradient

    def group_of(self, unit: int) -> dict[str, Any] | None:
        now = groups_by_parameter(self.optimizer)  # while it steps, DeepSpeed shows one group at a time
        found = now.get(id(self.zero.single_partition_of_fp32_groups[unit]))
        if found is not None:
            self.groups[unit] = found
        return self.groups.get(unit)

    def units_stepping(self) -> set[int]:
        now = groups_by_parameter(self.optimizer)
        return {unit for unit, flat in enumerate(self.zero.single_partition_of_fp32_groups) if id(flat) in now}


def _mapping(factor: Factor) -> Any:
    """DeepSpeed's link from a parameter to the part of its master in this process; None if this process has no part."""
    offset: Any = factor.offset
    return offset._hp_mapping


class ZeRO3(ZeRO):
    """ZeRO 3: every parameter is cut into equal parts, and sub-groups of parts are flat tensors."""

    def __init__(self, optimizer: Optimizer | None, zero: Any) -> None:
        super().__init__(optimizer, zero.dp_process_group)
        self.zero = zero

    def unit_of(self, factor: Factor) -> int | None:
        offset: Any = factor.offset
        held = getattr(offset, "_z3_optimizer", None) is self.zero
        return self.zero.grad_position[self.zero.get_param_id(offset)][0] if held else None

    def local_part(self, factor: Factor) -> tuple[int, int]:
        offset: Any = factor.offset
        size = self.zero.grad_position[self.zero.get_param_id(offset)][2]
        start = size * distributed.get_rank(self.processes)
        return min(start, offset.ds_numel), max(0, min(size, offset.ds_numel - start))  # the last part is padded

    def master(self, factor: Factor, part: Part) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Value and gradient (n) of this process's part, views of the sub-group's flat tensor."""
        unit, start, _ = self.zero.grad_position[self.zero.get_param_id(factor.offset)]
        flat = self.zero.fp32_partitioned_groups_flat[unit]
        gradient = None if flat.grad is None else flat.grad.narrow(0, start, part.size)
        return flat.detach().narrow(0, start, part.size), gradient

    def group_of(self, unit: int) -> dict[str, Any] | None:
        if self.optimizer is None:
            return None
        return self.optimizer.param_groups[self.zero.sub_group_to_group_id[unit]]

    def units_stepping(self) -> set[int]:
        now = groups_by_parameter(self.optimizer)
        return {unit for unit, flat in enumerate(self.zero.fp32_partitioned_groups_flat) if id(flat) in now}


def claim(factors: list[Factor], optimizer: Any) -> Engine | None:
    """ZeRO, if the factors are DeepSpeed's and `optimizer` is the one that steps them, else None.

    Raises:
        AttachError: DeepSpeed steps them in a way that does not go through the torch optimizer's `step`.
    """
    inner = innermost(optimizer)
    if inner is not None and not isinstance(inner, Optimizer):
        return None
    offsets: list[Any] = [factor.offset for factor in factors]
    for zero in stage3_of(offsets):
        if inner is None or inner in (zero.optimizer, getattr(zero, "backup_optimizer", None)):
            return _stage3(zero, inner, factors)
    if inner is None or not _is_flat(inner):
        return None
    if any(map(is_linked, offsets)):
        return _stage12(inner)
    if is_loaded():
        _refuse_unlinked_masters(offsets, inner)
    return None


def _stage12(inner: Optimizer) -> Engine | None:
    """The engine of ZeRO 1 and 2; None if no living DeepSpeed optimizer drives `inner`.

    Raises:
        AttachError: the DeepSpeed optimizer is not that of ZeRO 1 or 2.
    """
    zero = zero_driving(inner)
    if zero is None:
        return None
    if type(zero).__name__ != STAGE_12_CLASS:
        raise AttachError(
            f"DeepSpeed steps the factors through {type(zero).__name__}, which is not supported with SORSA; expected "
            "the optimizer of ZeRO 1, 2 or 3. Set zero_optimization.stage to 1 or more, and leave out zenflow and "
            "data_types.grad_accum_dtype in DeepSpeed's config."
        )
    return ZeRO12(inner, zero)


def _stage3(zero: Any, inner: Optimizer | None, factors: list[Factor]) -> Engine:
    if type(zero).__name__ != STAGE_3_CLASS or getattr(zero, "partial_offload", 1.0) < 1.0:
        raise AttachError(
            f"DeepSpeed steps the factors through {type(zero).__name__} with a second optimizer, where the regularizer "
            "cannot reach them. Remove SuperOffload, ZenFlow and offload_optimizer.ratio from DeepSpeed's config."
        )
    if getattr(zero, "swap_optimizer", False):
        raise AttachError(
            "DeepSpeed keeps the factors' masters on NVMe, which is not supported with SORSA: set offload_optimizer to "
            "cpu or none. An adapter's state is small."
        )
    if any(hasattr(factor.initial, "ds_id") for factor in factors):
        raise AttachError(
            "The frozen factors are parameters, which DeepSpeed leaves out of the adapter that it saves; expected "
            "buffers. Make TrainingArguments (or Accelerator) before get_peft_model(), or pass SORSACallback()."
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
    """(rows, r) of a factor.

    Raises:
        AttachError: the factor is a stack of matrices.
    """
    shape = getattr(factor.offset, "ds_shape", factor.offset.shape)
    if len(shape) != 2:
        raise AttachError(
            f"{factor.name} is a stack of experts of shape {tuple(shape)}, which DeepSpeed's partitions are not "
            "supported for; expected matrices. Train it with DDP."
        )
    return shape[0], shape[1]
