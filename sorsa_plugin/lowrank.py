"""y + (x R) L^T: the change that an adapter makes to a layer's output; knows no adapter."""

from __future__ import annotations

import torch


def add_low_rank(y: torch.Tensor, x: torch.Tensor, L: torch.Tensor, R: torch.Tensor) -> torch.Tensor:
    """Add the low-rank change to a base output.

    Args:
        y: base output (... x out); its dtype is kept.
        x: input (... x in).
        L, R: fp32 pair (out x 2r), (in x 2r); cast to the input's dtype, or by autocast, for the products only.

    Returns:
        y + (x R) L^T, (... x out).
    """
    change = (x @ R.to(x.dtype)) @ L.to(x.dtype).mT
    return y + change.to(y.dtype)
