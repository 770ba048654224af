"""SORSA on torchao's int8 weight-only nn.Linear."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torchao.quantization import Int8Tensor
from torchao.quantization.granularity import Granularity, PerGroup, PerRow, PerTensor

from sorsa_plugin.extend import SORSAQuantisedLinear


class SORSALinearInt8(SORSAQuantisedLinear):
    """A linear layer whose base stores W as int8, with one scale per tensor, row or group of columns."""

    def storage(self) -> str:
        rows, columns = self.stored_weight().block_size  # type: ignore[attr-defined]
        return f"torchao-int8-{rows}x{columns}"

    def dequantise(self, stored: Any) -> torch.Tensor:
        """W (out x in), fp32 and fresh."""
        return stored.dequantize(torch.float32)

    def quantise(self, matrix: torch.Tensor, like: Any) -> nn.Parameter:
        """W (out x in, fp32) as int8, with the granularity and the dtype of `like`."""
        made = Int8Tensor.from_hp(matrix.to(like.dtype), granularity_of(like), reduce_range=like.reduce_range)
        return nn.Parameter(made, requires_grad=False)


def granularity_of(tensor: Any) -> Granularity:
    """The granularity of an int8 tensor (out x in): which elements share a scale."""
    rows, columns = tensor.block_size
    if (rows, columns) == tuple(tensor.shape):
        return PerTensor()
    return PerRow() if columns == tensor.shape[1] else PerGroup(columns)
