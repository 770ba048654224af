"""Kinds whose change is added to the output: y = base(x) + change(x), for whole batches and for mixed ones."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ...linalg.offset_form import add_low_rank
from ...linalg.residual_form import add_initial, add_triplets
from ..layer import SORSALayer


class AdditiveLayer(SORSALayer):
    """A layer that calls its base module as it is and adds each adapter's change to the output."""

    @abstractmethod
    def add_change(self, y: torch.Tensor, x: torch.Tensor, adapter_name: str) -> torch.Tensor:
        """y + change(x), in the dtype of y, for the base output y (... x out) and the input x (... x in).

        y comes from `base_output` and may be consumed. Kinds that are not linear say what shapes they take.
        """

    def base_output(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """base(x) (... x out) for x (... x in); a tensor of its own if the kind's `add_change` consumes it."""
        return self.base_layer(x, *args, **kwargs)

    def forward(
        self, x: torch.Tensor, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any
    ) -> torch.Tensor:
        """Takes and returns what the base module does, in the dtype of its output.

        Args:
            x: input (... x in for a linear layer).
            adapter_names: the adapter of each row (dimension 0) of x; `mixed_batch.py` passes it.

        Raises:
            ValueError: there is not one adapter name per row, or adapters are merged into the layer.
            FoldError: adapter_names is given and the layer is folded.
            FactorsNotLoadedError, BaseMismatchError: see `ready_factors`.
        """
        self.unmerge_if_disabled()
        if adapter_names is not None and not self.disable_adapters:
            return self._mixed_forward(x, *args, adapter_names=adapter_names, **kwargs)
        y = self.base_output(x, *args, **kwargs)
        if not self.weight_state.is_whole:
            return complete(self, y, x)
        for name in self.adapters_in_use():
            y = self.add_change(y, x, name)
        return y

    def _mixed_forward(self, x: torch.Tensor, *args: Any, adapter_names: list[str], **kwargs: Any) -> torch.Tensor:
        groups = rows_by_adapter(self, len(x), adapter_names)
        y = self.base_layer(x, *args, **kwargs).clone()
        if self.weight_state.adapter is not None:
            y = add_initial(y, x, self.ready_factors(self.weight_state.adapter).parts())
        for name, rows in groups.items():
            y[rows] = self.add_change(y[rows], x[rows], name)
        return y


def complete(layer: SORSALayer, y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Complete the output of a layer whose stored weight lacks an adapter's initial triplets.

    Adds U S V^T of the adapter in use, or U0 S0 V0^T if none is in use.

    Args:
        layer: the layer.
        y: output of its base module (... x out), fresh: this function writes to it.
        x: input (... x in).

    Returns:
        (... x out), in the dtype of y.
    """
    holder = layer.weight_state.adapter
    assert holder is not None
    if layer.merged:
        return y
    names = layer.adapters_in_use()
    if len(names) == 1 and isinstance(layer.sorsa_dropout[names[0]], nn.Identity):
        return add_triplets(y, x, layer.ready_factors(names[0]).parts())
    y = add_initial(y, x, layer.ready_factors(holder).parts())
    for name in names:
        y = add_low_rank(y, layer.sorsa_dropout[name](x), layer.ready_factors(name).parts())
    return y


def rows_by_adapter(layer: SORSALayer, rows: int, adapter_names: Sequence[str]) -> dict[str, list[int]]:
    """{adapter of this layer: its rows}, in order of appearance; rows with other names are left out.

    Raises:
        ValueError: there is not one name per row, or adapters are merged into the layer.
        FoldError: the layer is folded.
    """
    if rows != len(adapter_names):
        raise ValueError(
            "Length of `adapter_names` should be the same as the number of inputs, but got "
            f"{len(adapter_names)} and {rows} respectively."
        )
    if layer.merged:
        raise ValueError(
            "Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter` first."
        )
    layer.weight_state.refuse_mixed_batch()
    own = [name for name in dict.fromkeys(adapter_names) if name in layer.sorsa_factors]
    return {name: [row for row, given in enumerate(adapter_names) if given == name] for name in own}
