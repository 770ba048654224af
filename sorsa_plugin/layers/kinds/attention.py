"""The attention kind: nn.MultiheadAttention, its input and output projections."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ...errors import UnsupportedLayerError
from ...plugins import hookimpl
from ..layer import SORSALayer
from .lending import LendingLayer, lent
from .linear import SORSALinear

if TYPE_CHECKING:
    from ...config import SORSAConfig


class SORSAMultiheadAttention(LendingLayer):
    """SORSA on nn.MultiheadAttention: adapts in_proj_weight (3 dim x dim), and out_proj with a layer inside.

    The attention never calls out_proj. It reads both weights, so both are lent to it.

    Raises:
        UnsupportedLayerError: query, key and value have different widths.
    """

    parameter_name = "in_proj_weight"

    def __init__(self, base_layer: nn.Module, name: str) -> None:
        base: Any = base_layer
        if base.in_proj_weight is None:
            raise UnsupportedLayerError(
                f"{name} is an attention whose query, key and value differ in width, so that it has three input "
                f'matrices. Adapt them one by one: target_parameters=["{name}.q_proj_weight", ...].'
            )
        super().__init__(base_layer, name)
        base.out_proj = SORSALinear(base.out_proj, f"{name}.out_proj")
        base.out_proj.foldable = False

    def lora_layout(self) -> tuple[Any, ...]:
        # measured on PEFT 0.20.0 and 0.21.2: LoRA's forward merges the change of out_proj twice
        return ("unsupported", "an nn.MultiheadAttention, where PEFT's LoRA applies the change of out_proj twice")

    @property
    def output_layer(self) -> SORSALinear:
        """The layer around out_proj."""
        return self.get_base_layer().out_proj

    def base_matrix(self) -> torch.Tensor:
        """in_proj_weight (3 dim x dim), the projections of query, key and value one below the other."""
        return self.base_weight()

    def update_layer(self, adapter_name: str, rank: int, config: SORSAConfig) -> None:
        """Add an adapter to both projections; see `LendingLayer.update_layer`."""
        super().update_layer(adapter_name, rank, config)
        self.output_layer.update_layer(adapter_name, rank, config)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Takes and returns what nn.MultiheadAttention does."""
        self.output_layer.unmerge_if_disabled()
        with lent(self.output_layer):
            return super().forward(*args, **kwargs)

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """The attention as it was, or merged; PEFT calls this."""
        base: Any = self.base_layer
        if merge:
            self.merge(safe_merge=safe_merge, adapter_names=adapter_names)
        base.out_proj = self.output_layer.unload_and_optionally_merge_module(merge, safe_merge, adapter_names)
        self._original.clear()  # last: if anything above fails, nothing is lost
        return base

    @property
    def _qkv_same_embed_dim(self) -> bool:
        return self.get_base_layer()._qkv_same_embed_dim  # torch's encoder layers read it


def leave_fused_encoders(model: nn.Module) -> None:
    """Keep nn.TransformerEncoder out of its fused inference path.

    That path reads the weights of attention and linear layers and calls none of them, so it would ignore their
    adapters. `unload` does not undo this: the ordinary path computes the same, up to rounding.
    """
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor = False
        elif isinstance(module, nn.TransformerEncoderLayer) and any(
            isinstance(m, SORSALayer) for m in module.modules()
        ):
            module.activation_relu_or_gelu = 0  # torch sets this if it has no fused kernel


@hookimpl
def sorsa_layer(target: nn.Module, config: SORSAConfig) -> type[SORSALayer] | None:
    """nn.MultiheadAttention."""
    return SORSAMultiheadAttention if isinstance(target, nn.MultiheadAttention) else None
