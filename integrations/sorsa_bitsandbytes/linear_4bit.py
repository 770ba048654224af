"""SORSA on bitsandbytes' Linear4bit: nf4 and fp4, with or without double quantisation, in any storage dtype."""

from __future__ import annotations

import copy
from typing import Any

import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Params4bit
from torch import nn

from sorsa_plugin.errors import UnsupportedLayerError
from sorsa_plugin.extend import SORSAQuantisedLinear


class SORSALinear4bit(SORSAQuantisedLinear):
    """A linear layer whose base stores W in 4-bit blocks.

    On CPUs with AVX512-BF16, bitsandbytes (0.50) packs the weight again in the first forward in eval mode: with scales
    rounded to bfloat16, and in a form through which no gradient passes. This class switches that off for adapted
    layers.

    Raises:
        UnsupportedLayerError: the weight has been packed that way already.
    """

    def __init__(self, base_layer: nn.Module, name: str) -> None:
        state = getattr(getattr(base_layer, "weight", None), "quant_state", None)
        if getattr(state, "packing_format_for_cpu", False):
            raise UnsupportedLayerError(
                f"bitsandbytes packed the weight of {name} for inference on this CPU, in the first forward in eval "
                "mode, and gradients no longer pass through it. Load the base model again, and adapt it before its "
                "first forward."
            )
        super().__init__(base_layer, name)
        self.get_base_layer().support_avx512bf16_for_cpu = False

    def storage(self) -> str:
        state = self._state(self.stored_weight())
        if state is None:
            return "4bit"
        return f"4bit-{state.quant_type}-{state.blocksize}{'-double' if state.nested else ''}"

    def store_weight(self, stored: Any) -> None:
        base = self.get_base_layer()
        stored.module = base
        base.weight = stored
        base.quant_state = stored.quant_state

    def dequantise(self, stored: Any) -> torch.Tensor:
        """W (out x in), fp32 and fresh; empty on the meta device."""
        state = self._state(stored)
        if state is None:  # on the meta device
            base = self.get_base_layer()
            return torch.empty(base.out_features, base.in_features, device=stored.device)
        state = copy.copy(state)
        state.dtype = torch.float32
        return dequantize_4bit(stored.data, state)

    def quantise(self, matrix: torch.Tensor, like: Any) -> nn.Parameter:
        """W (out x in, fp32) in 4 bits, with the settings and on the device of `like`."""
        state = self._state(like)
        made: Any = Params4bit(
            matrix,
            requires_grad=False,
            blocksize=state.blocksize,
            compress_statistics=state.nested,
            quant_type=state.quant_type,
            quant_storage=like.dtype,
        )
        made = made.to(like.device)
        made.quant_state.dtype = state.dtype  # the base layer computes in it unless its input says otherwise
        return made

    def _state(self, stored: Any) -> Any:
        """The scales. They are kept with the parameter, or with the module after FSDP has replaced the parameter."""
        return getattr(stored, "quant_state", None) or self.get_base_layer().quant_state
