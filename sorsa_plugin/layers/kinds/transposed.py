"""Kinds whose weight is stored (in x out)."""

from __future__ import annotations

import torch

from ..layer import SORSALayer


class TransposedLayer(SORSALayer):
    """A layer whose matrix (out x in) is the transpose of what its base module stores."""

    def base_matrix(self) -> torch.Tensor:
        return self.get_base_layer().weight.T

    def delta_to_weight(self, delta: torch.Tensor) -> torch.Tensor:
        return delta.T
