"""The embedding kind: nn.Embedding, plain or scaled (Gemma's, BART's)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional

from ...errors import UnsupportedLayerError
from ...plugins import hookimpl
from ..layer import SORSALayer
from ..storage import is_quantised
from .additive import AdditiveLayer
from .lending import LendingLayer
from .transposed import TransposedLayer

if TYPE_CHECKING:
    from ...config import SORSAConfig


class SORSAEmbedding(TransposedLayer, AdditiveLayer):
    """SORSA on nn.Embedding, whose W is stored (tokens x dim), so the matrix (out x in) is its transpose.

    A token's change is L times its row of R. Only the rows of the tokens at hand are formed.
    """

    def lora_layout(self) -> tuple[Any, ...]:
        return ("embedding",)

    def add_change(self, y: torch.Tensor, x: torch.Tensor, adapter_name: str) -> torch.Tensor:
        """y + change(x) for y (... x dim) and tokens x (...), in the dtype of y.

        Dropout drops tokens, which are the nonzero inputs of the change.
        """
        base, parts = self.get_base_layer(), self.ready_factors(adapter_name).parts()
        dV = functional.embedding(x, parts.dV, padding_idx=base.padding_idx, scale_grad_by_freq=base.scale_grad_by_freq)
        L, R = parts._replace(dV=dV, V0=functional.embedding(x, parts.V0)).pair()
        R = R * self.sorsa_dropout[adapter_name](R.new_ones(*x.shape, 1))
        with torch.autocast(y.device.type, enabled=False):
            change = R.to(y.dtype) @ L.to(y.dtype).mT
        scale = self._get_embed_scale()
        return y + (change if scale is None else change * scale.to(y.dtype))


class SORSALendingEmbedding(TransposedLayer, LendingLayer):
    """SORSA on an embedding with a forward of its own (OPT's positions): it looks up in the changed weight."""

    def lora_layout(self) -> tuple[Any, ...]:
        return ("unsupported", "an embedding with a forward of its own, which LoRA would look up differently")


@hookimpl
def sorsa_layer(target: nn.Module, config: SORSAConfig) -> type[SORSALayer] | None:
    """The kinds of this file.

    Raises:
        UnsupportedLayerError: the embedding has `max_norm`, which rewrites its weight at every look-up.
    """
    if not isinstance(target, nn.Embedding) or is_quantised(target):
        return None
    if target.max_norm is not None:
        raise UnsupportedLayerError(
            f"An embedding with max_norm={target.max_norm} rewrites its weight at every look-up, so it is no fixed "
            "matrix to adapt. Leave it out of target_modules."
        )
    scaled = hasattr(target, "embed_scale") and torch.as_tensor(target.embed_scale).numel() == 1
    plain = type(target).forward is nn.Embedding.forward
    return SORSAEmbedding if plain or scaled else SORSALendingEmbedding
