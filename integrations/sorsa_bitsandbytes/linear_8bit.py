"""SORSA on bitsandbytes' Linear8bitLt (LLM.int8()): one scale per row."""

from __future__ import annotations

from typing import Any

import torch
from bitsandbytes.functional import int8_vectorwise_dequant
from bitsandbytes.nn import Int8Params
from torch import nn

from sorsa_plugin.extend import SORSAQuantisedLinear


class SORSALinear8bit(SORSAQuantisedLinear):
    """A linear layer whose base stores W as int8 with one scale per row.

    bitsandbytes keeps the scales with the parameter until the first forward, then in the module's `state`.
    """

    def storage(self) -> str:
        return "int8-rows"

    def stored_weight(self) -> nn.Parameter:
        """A parameter on the same memory that carries its scales, taken from where bitsandbytes keeps them now."""
        base = self.get_base_layer()
        weight = base.weight
        if weight.is_meta:
            return weight
        scales = weight.SCB if weight.SCB is not None else base.state.SCB
        return Int8Params(weight.data, requires_grad=False, has_fp16_weights=False, CB=weight.data, SCB=scales)

    def store_weight(self, stored: Any) -> None:
        base = self.get_base_layer()
        base.weight = stored
        base.state.reset_grads()  # drops what the last forward left; the next forward takes the new weight

    def dequantise(self, stored: Any) -> torch.Tensor:
        """W (out x in), fp32 and fresh; empty on the meta device."""
        if stored.is_meta:
            return torch.empty(stored.shape, device="meta")
        return int8_vectorwise_dequant(stored.data, stored.SCB.to(stored.device))

    def quantise(self, matrix: torch.Tensor, like: Any) -> nn.Parameter:
        """W (out x in, fp32) as int8 with one scale per row, on the device of `like`."""
        # from the CPU: bitsandbytes quantises only while it moves a weight from there to a device
        made: Any = Int8Params(matrix.cpu(), requires_grad=False, has_fp16_weights=False)
        return made.to(like.device)
