"""Where do a factor's values and gradient live while an optimizer steps it? The question, and the plain answer.

Other answers (sharded tensors, flat partitions) come from plug-ins through `sorsa_engine`, one class an engine.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch.optim.optimizer import Optimizer

from ..errors import AttachError
from ..plugins import hookimpl, manager
from .optimizers import groups_by_parameter, innermost
from .trained_factors import Factor

BATCH_ELEMENTS = 2**23
"""Elements of the factors that are multiplied at a time: 32 MiB in fp32, and twice that with the products."""


class Share(NamedTuple):
    """The part that this process steps of one factor P = initial + offset (rows x r), or of m factors of a stack.

    Attributes:
        name: of the factor, or of the stack.
        initial, offset: whole rows (n x r), those of m factors of a stack (m x n x r), or n elements in row-major order
            (n); n may be 0. `offset` is the memory that the optimizer writes, fp32.
        gradient: the memory from which the optimizer reads the gradient, in the shape of `offset`; None if the step
            leaves this factor out.
        rank: r.
        group: the optimizer's parameter group, or None without an optimizer.
        spread: the process groups over which the rows are spread; empty if every process has all of them.
        start: number of the first element in row-major order, or of the first factor of a stack.
        cuts: the rows of the whole factor of which no process has all elements, in order, the same on every process.
    """

    name: str
    initial: torch.Tensor
    offset: torch.Tensor
    gradient: torch.Tensor | None
    rank: int
    group: dict[str, Any] | None = None
    spread: tuple[Any, ...] = ()
    start: int = 0
    cuts: tuple[int, ...] = ()

    @property
    def matrices(self) -> int:
        """The number of factors P in this share."""
        return self.offset.shape[0] if self.offset.ndim == 3 else 1

    def names(self) -> list[str]:
        """The name of every factor in this share."""
        if self.offset.ndim != 3:
            return [self.name]
        return [f"{self.name}[{self.start + i}]" for i in range(self.matrices)]


class Engine(ABC):
    """Where the factors live under one training engine.

    Args:
        optimizer: the torch optimizer whose `step()` updates the factors, after gradients are reduced, unscaled and
            clipped. None if there is none yet, to measure gaps.
    """

    owns_parameters = True
    """Whether the optimizer steps the adapter's own parameters, rather than masters of them."""

    def __init__(self, optimizer: Optimizer | None) -> None:
        self.optimizer = optimizer

    @abstractmethod
    def shares(self, factors: Iterable[Factor]) -> list[Share]:
        """The shares of the factors that the optimizer owns, in the order of `factors`, the same on every process."""

    @abstractmethod
    def owns(self, factor: Factor) -> bool:
        """Whether the optimizer steps the factor. Without an optimizer: whether the factor lives under this engine."""

    def stepping(self, factors: Iterable[Factor]) -> list[Share]:
        """The shares that the current call to `step()` updates: not all, if an engine steps group by group."""
        return self.shares(factors)

    def begins_step(self) -> bool:
        """Whether the current call to `step()` is the first one of an optimizer step."""
        return True


class WholeFactors(Engine):
    """One process or DDP: every process has every factor and its reduced gradient."""

    def owns(self, factor: Factor) -> bool:
        return self.optimizer is None or id(factor.offset) in groups_by_parameter(self.optimizer)

    def shares(self, factors: Iterable[Factor]) -> list[Share]:
        groups, found = groups_by_parameter(self.optimizer), []
        for factor in factors:
            offset, group = factor.offset, groups.get(id(factor.offset))
            if group is None and self.optimizer is not None:
                continue
            rank = offset.shape[-1]
            if offset.ndim == 2:
                found.append(Share(factor.name, factor.initial, offset, offset.grad, rank, group))
                continue
            size = max(1, BATCH_ELEMENTS // max(1, offset[0].numel()))
            for start in range(0, factor.matrices, size):
                part = slice(start, start + size)
                gradient = None if offset.grad is None else offset.grad[part]
                found.append(Share(factor.name, factor.initial[part], offset[part], gradient, rank, group, start=start))
        return found


@hookimpl(trylast=True)
def sorsa_engine(factors: list[Factor], optimizer: Any) -> Engine | None:
    """Plain matrices, owned by the torch optimizer, which may be wrapped."""
    inner = innermost(optimizer)
    owned = factors
    if inner is not None:
        groups = groups_by_parameter(inner) if isinstance(inner, Optimizer) else {}
        owned = [factor for factor in factors if id(factor.offset) in groups]
    plain = all(type(factor.offset.data) is torch.Tensor and factor.offset.ndim in (2, 3) for factor in owned)
    return WholeFactors(inner) if owned and plain else None


def find_engine(factors: list[Factor], optimizer: Any) -> Engine:
    """The engine under which some factors live.

    Args:
        factors: at least one factor.
        optimizer: the optimizer that steps them, or a wrapper of it; None to measure gaps.

    Raises:
        AttachError: no plug-in knows the optimizer, or one knows it and cannot serve it.
    """
    engine = manager().hook.sorsa_engine(factors=factors, optimizer=optimizer)
    if engine is None:
        owner = type(optimizer).__name__ if optimizer is not None else "This process"
        raise AttachError(
            f"{owner} owns none of the model's {len(factors)} SORSA factors, and no plug-in knows an engine that would "
            "step them through it. Build the optimizer after get_peft_model(), from the parameters that require grad; "
            "or train with DDP, FSDP2 or DeepSpeed ZeRO; or add a `sorsa_engine` plug-in for this engine."
        )
    return engine
