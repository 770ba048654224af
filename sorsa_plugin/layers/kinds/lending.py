"""Kinds whose base module reads its weight by itself: while its forward runs, it finds W + L R^T in place of W.

That is right whatever the module does with its weight, and costs one matrix of the weight's size per forward. If the
weight has 16 bits, so has the sum: changes below its rounding do not show, as after merging. Threads that share a model
take turns at such a module.
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
"""{base module that was lent a weight: its lock}. Not kept on the modules, which are copied and pickled."""


class LendingLayer(SORSALayer):
    """A layer that lends its base module the changed weight.

    A weight of three dimensions is a stack of matrices (experts), each with its own triplets.
    """

    def delta_to_weight(self, delta: torch.Tensor) -> torch.Tensor:
        """The change as it is: by default the weight is stored (out x in), or as a stack (E x out x in)."""
        return delta

    def update_layer(self, adapter_name: str, rank: int, config: SORSAConfig) -> None:
        """See `SORSALayer.update_layer`.

        Raises:
            SORSAConfigError: the config asks for dropout. The change has no input of its own that could be dropped.
            RankError, FoldError: see `SORSALayer.update_layer`.
        """
        if config.sorsa_dropout > 0:
            raise SORSAConfigError(
                f"sorsa_dropout is {config.sorsa_dropout}, and {self.name} ({type(self).__name__}) computes with its "
                "changed weight, so that there is no input of the change to drop. Set sorsa_dropout=0, or "
                "leave it out of target_modules and target_parameters."
            )
        super().update_layer(adapter_name, rank, config)

    def forward(self, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any) -> Any:
        """Takes and returns what the base module does.

        Raises:
            ValueError: `adapter_names` is given: rows of a batch cannot have weights of their own.
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
    """In this context the layer's base module finds the changed weight under its parameter's name."""
    names = layer.adapters_in_use()
    if not names:
        yield
        return
    base = layer.get_base_layer()
    with nullcontext() if torch.compiler.is_compiling() else _locks.setdefault(base, RLock()):
        # an instance attribute hides the parameter, which stays registered: lists of parameters do not change
        attributes = vars(base)
        attributes[layer.parameter_name] = changed_weight(layer, names)
        try:
            yield
        finally:
            del attributes[layer.parameter_name]


@with_base_weight
def changed_weight(layer: SORSALayer, adapter_names: list[str]) -> torch.Tensor:
    """W plus the adapters' changes, in the shape and dtype of W. W itself, bit for bit, while the changes are zero."""
    matrix = layer.base_matrix()
    with torch.autocast(matrix.device.type, enabled=False):
        for name in adapter_names:
            L, R = (part.to(matrix.dtype) for part in layer.ready_factors(name).low_rank_pair())
            matrix = torch.addmm(matrix, L, R.mT) if matrix.ndim == 2 else torch.baddbmm(matrix, L, R.mT)
    return layer.delta_to_weight(matrix).contiguous()  # strides decide which kernel multiplies, hence the rounding
