"""Kinds whose base module reads its weight by itself: while its forward runs, it finds W + L R^T in its place.

This is right for whatever the module does with its weight, and costs one matrix of the weight's size per forward.
Where the weight has 16 bits, so has the sum: changes below its rounding do not show, as after merging. Threads that use
one model take turns at such a module.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from threading import RLock
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from ...errors import SORSAConfigError
from ..base_weight import with_base_weight
from ..layer import SORSALayer

if TYPE_CHECKING:
    from ...config import SORSAConfig

_locks: WeakKeyDictionary[nn.Module, Any] = WeakKeyDictionary()
"""Of base modules that were lent a weight; not on them, because modules are copied and pickled and locks are not."""


class LendingLayer(SORSALayer):
    """A layer that lends its base module the changed weight.

    Weights of three dimensions are stacks of matrices (experts), each with triplets of its own.
    """

    def delta_to_weight(self, delta: torch.Tensor) -> torch.Tensor:
        return delta

    def update_layer(self, adapter_name: str, rank: int, config: SORSAConfig) -> None:
        """See `SORSALayer.update_layer`.

        Raises:
            SORSAConfigError: dropout is asked for, and the change has no input of its own that could be dropped.
        """
        if config.sorsa_dropout > 0:
            raise SORSAConfigError(
                f"sorsa_dropout is {config.sorsa_dropout}, and {self.name} ({type(self).__name__}) computes with its "
                "changed weight, so that there is no input of the change to drop. Set sorsa_dropout=0, or exclude it."
            )
        super().update_layer(adapter_name, rank, config)

    def forward(self, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any) -> Any:
        """What the base module takes and gives.

        Raises:
            ValueError: `adapter_names` was given: rows of a batch cannot have weights of their own.
        """
        if adapter_names is not None:
            raise ValueError(
                f"{self.name} ({type(self).__name__}) does not support mixed adapter batches: its weight is changed "
                "for the whole batch. Use one adapter per batch."
            )
        self.unmerge_if_disabled()
        with lent(self):
            return self.base_layer(*args, **kwargs)


@contextmanager
def lent(layer: SORSALayer) -> Iterator[None]:
    """While the context lasts, the layer's base module finds the changed weight under its parameter's name."""
    names = layer.adapters_in_use()
    if not names:
        yield
        return
    base = layer.get_base_layer()
    with nullcontext() if torch.compiler.is_compiling() else _locks.setdefault(base, RLock()):
        # an instance attribute hides the parameter, which stays registered: nothing that lists parameters sees a change
        attributes = vars(base)
        attributes[layer.parameter_name] = changed_weight(layer, names)
        try:
            yield
        finally:
            del attributes[layer.parameter_name]


@with_base_weight
def changed_weight(layer: SORSALayer, adapter_names: list[str]) -> torch.Tensor:
    """W plus the adapters' changes, in the shape and dtype of W; W itself, bit for bit, while they are zero."""
    matrix = layer.base_matrix()
    with torch.autocast(matrix.device.type, enabled=False):
        for name in adapter_names:
            L, R = (part.to(matrix.dtype) for part in layer.ready_factors(name).low_rank_pair())
            matrix = torch.addmm(matrix, L, R.mT) if matrix.ndim == 2 else torch.baddbmm(matrix, L, R.mT)
    return layer.delta_to_weight(matrix).contiguous()  # strides decide which kernel multiplies, and how it rounds
