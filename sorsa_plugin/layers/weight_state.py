"""What a base module stores for its weight W: W itself, or what is left of it without an adapter's initial triplets.

    Intact      W
    Folded      W_r = W - U0 S0 V0^T, for as long as somebody wants it: W is kept, and comes back bit for bit
    Residual    Q(W_r) for good, on a quantised base (QSORSA): there is no W to put back

Each state says what a layer may do in it, and how W is had from what is stored.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Protocol

import torch
from torch import nn

from ..errors import FoldError
from ..linalg.precision import full_precision
from .factors import SORSAFactors


class StoredLayer(Protocol):
    """What a state asks of the layer that is in it."""

    name: str
    weight_state: WeightState
    sorsa_factors: nn.ModuleDict

    @property
    def merged(self) -> bool: ...
    def get_base_layer(self) -> Any: ...
    def factors(self, adapter_name: str) -> SORSAFactors: ...
    def ready_factors(self, adapter_name: str) -> SORSAFactors: ...
    def delta_to_weight(self, delta: torch.Tensor) -> torch.Tensor: ...
    def stored_weight(self) -> nn.Parameter: ...
    def store_weight(self, stored: nn.Parameter) -> None: ...
    def as_stored(self, weight: torch.Tensor, original: nn.Parameter) -> nn.Parameter: ...
    def merged_weight(self, names: list[str], safe: bool = False) -> torch.Tensor: ...


class WeightState:
    """A state; the defaults are those of an intact weight.

    Attributes:
        adapter: whose initial triplets the stored weight lacks; None where it lacks none.
    """

    adapter: str | None

    is_whole: ClassVar[bool] = False
    """Whether what is stored is W."""

    is_residual: ClassVar[bool] = False
    """Whether what is stored is a residual for good."""

    # -- reading and writing ----------------------------------------------------------------------------------------

    def shown(self, layer: StoredLayer) -> torch.Tensor:
        """W in the shape and dtype of the stored weight, for code that reads it off a layer that is not merged; a
        residual where that is all there is."""
        return layer.get_base_layer().weight

    def full(self, layer: StoredLayer, weight: torch.Tensor) -> torch.Tensor:
        """W from what is stored, read as a plain matrix of fp32 at least, in its shape and on its device."""
        return weight

    @contextmanager
    def intact_weight(self, layer: StoredLayer) -> Iterator[None]:
        """In this context the base module shows W; the residual where that is all there is."""
        yield

    def rewrite(self, layer: StoredLayer) -> None:
        """Write the stored weight anew, after a file may have replaced the initial triplets."""

    def moved(self, fn: Callable[[torch.Tensor], torch.Tensor]) -> WeightState:
        """The state after what it keeps was taken to another device or dtype."""
        return self

    def restore(self, layer: StoredLayer) -> None:
        """Have the base module store W.

        Raises:
            FoldError: that cannot be done.
        """

    # -- adapters come and go ---------------------------------------------------------------------------------------

    def refuse_beside(self, layer: StoredLayer, adapter_name: str, rank: int) -> None:
        """Raises FoldError where no adapter of this name and rank can be added."""

    def refuse_to_factorise(self, layer: StoredLayer, adapter_name: str) -> None:
        """Raises FoldError where the stored weight lacks the triplets that a factorisation would look for."""

    def refuse_mixed_batch(self) -> None:
        """Raises FoldError where rows of a batch cannot use different adapters."""

    def needs(self, layer: StoredLayer, adapter_name: str) -> bool:
        """Whether this adapter alone holds what the stored weight lacks for good."""
        return False

    def refuse_to_delete(self, layer: StoredLayer, adapter_name: str) -> None:
        """Raises FoldError where an adapter is needed."""

    def before_delete(self, layer: StoredLayer, adapter_name: str) -> None:
        """What has to happen before an adapter is deleted.

        Raises:
            FoldError: it is needed.
        """

    def before_unload(self, layer: StoredLayer, merging: bool) -> None:
        """What has to happen before the base module goes on without its layer, merged or not: what is left must be W,
        or the merge of it.

        Raises:
            FoldError: nothing is merged, and W cannot be put back.
        """

    def after_unload(self, layer: StoredLayer) -> None:
        """What has to happen after that."""


@dataclass(frozen=True)
class Intact(WeightState):
    """The base module stores W."""

    adapter: None = None
    is_whole: ClassVar[bool] = True


@dataclass(frozen=True)
class Folded(WeightState):
    """The base module stores W - U0 S0 V0^T; see `folding.py`.

    Attributes:
        intact: W as it was stored.
    """

    adapter: str
    intact: torch.Tensor

    def shown(self, layer: StoredLayer) -> torch.Tensor:
        return self.intact

    def full(self, layer: StoredLayer, weight: torch.Tensor) -> torch.Tensor:
        return self.intact.to(weight)

    @contextmanager
    def intact_weight(self, layer: StoredLayer) -> Iterator[None]:
        weight = layer.get_base_layer().weight
        stored, weight.data = weight.data, self.intact
        try:
            yield
        finally:
            weight.data = stored

    @torch.no_grad()
    @full_precision()
    def rewrite(self, layer: StoredLayer) -> None:
        """Computed in fp32 at least, and rounded once."""
        initial = layer.delta_to_weight(layer.ready_factors(self.adapter).initial_matrix())
        total = self.intact.to(torch.promote_types(self.intact.dtype, torch.float32)) - initial.to(self.intact.device)
        layer.get_base_layer().weight.data = total.to(self.intact.dtype)

    def moved(self, fn: Callable[[torch.Tensor], torch.Tensor]) -> WeightState:
        return replace(self, intact=fn(self.intact))

    @torch.no_grad()
    def restore(self, layer: StoredLayer) -> None:
        if layer.merged:
            raise FoldError(
                f"{layer.name} is merged, and unfolding would lose the change. Call unmerge_adapter() first."
            )
        weight = layer.get_base_layer().weight
        weight.data = self.intact.to(weight.device)
        layer.weight_state = Intact()

    def refuse_beside(self, layer: StoredLayer, adapter_name: str, rank: int) -> None:
        raise FoldError(
            f"{layer.name} is folded, and a folded layer has one adapter: {adapter_name!r} cannot be added beside "
            f"{self.adapter!r}. Call unfold() first."
        )

    def refuse_to_factorise(self, layer: StoredLayer, adapter_name: str) -> None:
        _refuse_other_triplets(layer, self.adapter, adapter_name)

    def refuse_mixed_batch(self) -> None:
        raise FoldError("Cannot pass `adapter_names` while the model is folded, please call `unfold()` first.")

    def before_delete(self, layer: StoredLayer, adapter_name: str) -> None:
        self.restore(layer)

    def before_unload(self, layer: StoredLayer, merging: bool) -> None:
        if layer.merged:  # the base layer stores W and the change already
            layer.weight_state = Intact()
        else:
            self.restore(layer)


class Mark(Protocol):
    """A note on a model that its weights are residuals."""

    def forget(self) -> None: ...


@dataclass(frozen=True)
class Residual(WeightState):
    """The base module stores the quantised residual of W, for good; see `qsorsa/residual.py`.

    Attributes:
        mark: what the model's config says about residuals; forgotten when W is whole again.
    """

    adapter: str
    mark: Mark

    is_residual: ClassVar[bool] = True

    def full(self, layer: StoredLayer, weight: torch.Tensor) -> torch.Tensor:
        initial = layer.factors(self.adapter).initial_matrix()
        return weight + layer.delta_to_weight(initial).to(weight.device)

    def restore(self, layer: StoredLayer) -> None:
        raise FoldError(
            f"The base model stores a quantised residual of {layer.name}, so there is no W to put back. Merge with "
            "merge_and_unload() or merge_and_dequantize(), or load the model that it was made from."
        )

    def refuse_beside(self, layer: StoredLayer, adapter_name: str, rank: int) -> None:
        known = layer.factors(self.adapter).rank if self.adapter in layer.sorsa_factors else rank
        if known != rank:
            raise FoldError(
                f"{layer.name} stores the residual of {known} singular triplets, so every adapter on it has rank "
                f"{known}; {adapter_name!r} has {rank}. Give it that rank."
            )

    def refuse_to_factorise(self, layer: StoredLayer, adapter_name: str) -> None:
        _refuse_other_triplets(layer, self.adapter, adapter_name)

    def needs(self, layer: StoredLayer, adapter_name: str) -> bool:
        return not _others(layer, adapter_name)

    def refuse_to_delete(self, layer: StoredLayer, adapter_name: str) -> None:
        if self.needs(layer, adapter_name):
            self.restore(layer)

    def before_delete(self, layer: StoredLayer, adapter_name: str) -> None:
        """Name another adapter that holds what the base lacks."""
        self.refuse_to_delete(layer, adapter_name)
        layer.weight_state = replace(self, adapter=_others(layer, adapter_name)[0])

    def before_unload(self, layer: StoredLayer, merging: bool) -> None:
        if not merging and not layer.merged:
            self.restore(layer)

    @torch.no_grad()
    def after_unload(self, layer: StoredLayer) -> None:
        """Store W, quantised again, where nothing is merged into it."""
        if not layer.merged:
            layer.store_weight(layer.as_stored(layer.merged_weight([]), layer.stored_weight()))
        self.mark.forget()


def _refuse_other_triplets(layer: StoredLayer, holder: str, adapter_name: str) -> None:
    raise FoldError(
        f"{layer.name} stores the residual of the triplets of {holder!r}, and {adapter_name!r} cannot start from "
        "others. Give it the same svd, svd_seed and svd_energy."
    )


def _others(layer: StoredLayer, adapter_name: str) -> list[str]:
    return [name for name in layer.sorsa_factors if name != adapter_name]
