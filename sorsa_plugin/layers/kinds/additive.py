"""Kinds whose change joins the output: y = base(x) + change(x), for whole batches and for mixed ones."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch

from ...linalg.residual_form import add_initial, complete
from ...tuner.mixed_batch import rows_by_adapter
from ..layer import SORSALayer


class AdditiveLayer(SORSALayer):
    """A layer that calls its base module as it is and adds each adapter's change to the output."""

    @abstractmethod
    def add_change(self, y: torch.Tensor, x: torch.Tensor, adapter_name: str) -> torch.Tensor:
        """y + change(x), in the dtype of y; y is from `base_output`, and may be consumed."""

    def base_output(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """base(x), fresh where the kind's `add_change` consumes it."""
        return self.base_layer(x, *args, **kwargs)

    def forward(
        self, x: torch.Tensor, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any
    ) -> torch.Tensor:
        """What the base module takes and gives, in the dtype of its output.

        Of `adapter_names`, which `mixed_batch.py` hands over, each is the adapter of one row (dimension 0) of x.
        """
        self.unmerge_if_disabled()
        if adapter_names is not None and not self.disable_adapters:
            return self._mixed_forward(x, *args, adapter_names=adapter_names, **kwargs)
        y = self.base_output(x, *args, **kwargs)
        if self.folded is not None:
            return complete(self, y, x)
        for name in self.adapters_in_use():
            y = self.add_change(y, x, name)
        return y

    def _mixed_forward(self, x: torch.Tensor, *args: Any, adapter_names: list[str], **kwargs: Any) -> torch.Tensor:
        groups = rows_by_adapter(self, len(x), adapter_names)
        y = self.base_layer(x, *args, **kwargs).clone()
        if self.folded is not None:
            y = add_initial(y, x, self.ready_factors(self.folded.adapter).parts())
        for name, rows in groups.items():
            y[rows] = self.add_change(y[rows], x[rows], name)
        return y
