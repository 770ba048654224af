"""Layers tied to an adapted embedding (`ensure_weight_tying`): they use its adapter, transposed, and own none.

The output layer's weight is the embedding's, so its change is the embedding's. The embedding's matrix is W^T, so that
change is (L R^T)^T = R L^T.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ...errors import UnsupportedLayerError
from ...linalg.offset_form import Parts
from ..layer import SORSALayer
from .embedding import SORSAEmbedding
from .linear import SORSALinear

if TYPE_CHECKING:
    from ...config import SORSAConfig


class SharedFactors:
    """The factors of an embedding, in the order in which a tied layer reads them.

    Args:
        parts: the embedding's tensors.
        transposed: whether the layer's matrix is the transpose of the embedding's: then U and V change places.
    """

    def __init__(self, parts: Parts, transposed: bool) -> None:
        if transposed:
            parts = Parts(parts.dV, parts.dS, parts.dU, parts.V0, parts.S0, parts.U0)
        self._parts = parts

    def parts(self) -> Parts:
        """See `SORSAFactors.parts`."""
        return self._parts

    def low_rank_pair(self) -> tuple[torch.Tensor, torch.Tensor]:
        """L (out x 2r) and R (in x 2r) of the tied layer; see `SORSAFactors.low_rank_pair`."""
        return self._parts.pair()


class TiedLayer(SORSALayer):
    """A layer without factors of its own.

    Attributes:
        source: the embedding's layer, whose adapters this layer uses.
    """

    source: SORSALayer
    foldable = False

    def lora_layout(self) -> tuple[Any, ...]:
        return ("tied", self.source.name)

    def update_layer(self, adapter_name: str, rank: int, config: SORSAConfig) -> None:
        """Note the adapter's config and dropout: the layer owns nothing else."""
        self.add_dropout(adapter_name, config.sorsa_dropout)
        self.configs[adapter_name] = config

    def adapters_in_use(self) -> list[str]:
        """The embedding's adapters that are active here; none while adapters are disabled or merged."""
        if self.disable_adapters or self.merged:
            return []
        return [name for name in self.active_adapters if name in self.configs and name in self.source.sorsa_factors]

    def ready_factors(self, adapter_name: str) -> Any:
        """The embedding's factors, transposed for a linear layer; errors as in `AdaptedWeight.ready_factors`."""
        parts = self.source.ready_factors(adapter_name).parts()
        return SharedFactors(parts, transposed=isinstance(self, SORSALinear))

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Take over the embedding's merged weight, so that the two stay one parameter; merge the embedding if needed.

        Raises:
            ValueError, MergeError: see `MergeableWeight.merge`.
        """
        names = self.active_adapters if adapter_names is None else adapter_names
        names = [name for name in names if name in self.configs and name not in self.merged_adapters]
        missing = [name for name in names if name not in self.source.merged_adapters]
        if missing:
            self.source.merge(safe_merge=safe_merge, adapter_names=missing)
        if names:
            self._original = self._original or [self.base_weight()]
            self.store_weight(self.source.base_weight())
            self.merged_adapters.extend(names)


class SORSATiedLinear(TiedLayer, SORSALinear):
    """An output layer whose weight is an embedding's."""


class SORSATiedEmbedding(TiedLayer, SORSAEmbedding):
    """An embedding whose weight is another embedding's."""


def tied_layer(target: nn.Module, name: str, source: nn.Module) -> SORSALayer:
    """The layer for a module that shares the weight of an adapted embedding.

    Raises:
        UnsupportedLayerError: the embedding is not adapted, or the module is neither linear nor an embedding.
    """
    kinds: dict[type, type[TiedLayer]] = {nn.Linear: SORSATiedLinear, nn.Embedding: SORSATiedEmbedding}
    kind = next((kind for base, kind in kinds.items() if isinstance(target, base)), None)
    if kind is None or not isinstance(source, SORSAEmbedding):
        raise UnsupportedLayerError(
            f"{name} of type {type(target).__name__} is tied to an embedding of type {type(source).__name__}; expected "
            "a linear layer tied to an adapted nn.Embedding. Set ensure_weight_tying=False, or exclude both."
        )
    layer = kind(target, name)
    object.__setattr__(layer, "source", source)  # not a submodule: its tensors are saved where they are
    return layer
