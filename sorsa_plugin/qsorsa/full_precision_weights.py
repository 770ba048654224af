"""The full-precision weights that a quantised base was made from, read one at a time; knows no adapter."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cached_property
from os import PathLike
from typing import Any

import torch
from torch import nn

from ..compat.transformers import is_deepspeed_zero3_enabled
from ..errors import BaseFilesError, BaseMismatchError
from ..layers.storage import was_conv1d

Source = str | PathLike[str] | Mapping[str, torch.Tensor]

MOST_ROUNDING = 0.5
"""||W - dequantised|| / ||W|| above which a base was not quantised from W. nf4 and fp4 give about 0.1, another model's
weight 1.4."""


class FullPrecisionWeights:
    """W of a model's linear modules.

    Args:
        source: a directory or hub id of safetensors, as the model's own; or {module name + ".weight": tensor (out x
            in)}.
        model: the quantised model, for its names.
        revision: of the source on the hub.

    Attributes:
        of_whole_model: whether the model has a config, which would say if its weights were residuals (`residual.py`).
    """

    def __init__(self, source: Source, model: nn.Module, revision: str | None = None) -> None:
        self.source = source
        self.revision = revision
        self.architecture = type(model).__name__
        self.of_whole_model = hasattr(model, "config")

    def weight(self, name: str, base: nn.Module, rounded: torch.Tensor) -> torch.Tensor:
        """W (out x in) of a module, fp32, on the device of `rounded`.

        Args:
            name: the module's dotted name.
            base: the quantised module.
            rounded: its dequantised weight (out x in), which W is compared with.

        Raises:
            BaseFilesError: the source does not have the weight.
            BaseMismatchError: the base was not quantised from the weight.
        """
        W = self._read(f"{name}.weight").to(rounded.device, torch.float32)
        if was_conv1d(base):
            W = W.T
        if W.shape != rounded.shape:
            raise BaseMismatchError(
                f"{name} has a weight of shape {tuple(W.shape)} in {self._where()}; the quantised base has "
                f"{tuple(rounded.shape)}. Give the full-precision checkpoint that the base was quantised from."
            )
        size = W.norm()
        error = (W - rounded).norm()
        if not error <= MOST_ROUNDING * size:  # not a quotient, so that a weight of zeros passes
            raise BaseMismatchError(
                f"The weight of {name} in {self._where()} differs by {float(error / size):.2g} (relative) from the "
                f"quantised base's; expected at most {MOST_ROUNDING:g}, what few bits explain. Give the full-precision "
                "checkpoint that the base was quantised from, in full_precision_base."
            )
        return W

    def _read(self, parameter: str) -> torch.Tensor:
        if not isinstance(self.source, Mapping):
            return self._stored.read(parameter)
        if parameter not in self.source:
            raise BaseFilesError(
                f"The weights given have no {parameter}; they have {', '.join(list(self.source)[:3])} and so on. Give "
                "the full-precision weights under the model's own names."
            )
        return self.source[parameter]

    @cached_property
    def _stored(self) -> Any:
        from ..files.base_checkpoint import BaseFiles
        from ..files.stored_parameters import StoredWeights

        assert not isinstance(self.source, Mapping)
        if not str(self.source):
            raise BaseFilesError(
                "The base model does not say where it was loaded from, so its full-precision weights cannot be read. "
                "Name them in full_precision_base, or give quantize_residual() the weights."
            )
        if is_deepspeed_zero3_enabled():  # then no model with whole shapes can be made
            raise BaseFilesError(
                "Under DeepSpeed ZeRO 3 residuals cannot be made: the full-precision weights are partitioned as they "
                "are read. Use DDP, FSDP2 or ZeRO 2, or adapter: sorsa."
            )
        files = BaseFiles(self.source, self.revision)
        files.config.architectures = [self.architecture]  # the class that was loaded, whatever config.json says
        return StoredWeights(files, files.empty_model())

    def _where(self) -> str:
        return "the weights given" if isinstance(self.source, Mapping) else str(self.source)


_given: ContextVar[Source | None] = ContextVar("sorsa_full_precision_weights", default=None)


@contextmanager
def full_precision_weights(source: Source | None) -> Iterator[None]:
    """In this context, residuals are made from these weights, whatever adapters and models say; None: as they say."""
    token = _given.set(source)
    try:
        yield
    finally:
        _given.reset(token)


def source_of(model: Any, named: str | None) -> Source:
    """Where the full-precision weights of a quantised model are.

    In this order: the context `full_precision_weights`, `named` (an adapter's option), the place the model was loaded
    from.
    """
    given = _given.get()
    if given is not None:
        return given
    return named or getattr(model, "name_or_path", "") or ""
