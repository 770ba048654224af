"""What kinds share whose weight is stored (in x out)."""

from __future__ import annotations

import torch

from ..layer import SORSALayer


class TransposedLayer(SORSALayer):
    """A layer whose matrix (out x in) is the transpose of the stored weight (in x out)."""

    def base_matrix(self) -> torch.Tensor:
        """The matrix (out x in), a transposed view of the stored weight."""
        return self.get_base_layer().weight.T

    def delta_to_weight(self, delta: torch.Tensor) -> torch.Tensor:
        """A change (out x in) in the stored shape (in x out)."""
        return delta.T
