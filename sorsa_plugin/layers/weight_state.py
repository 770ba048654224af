"""What a base module stores for its weight W: W itself, or W without an adapter's initial triplets.

    Intact      W
    Folded      W_r = W - U0 S0 V0^T, until it is unfolded: W is kept, and comes back bit for bit
    Residual    Q(W_r) for good, on a quantised base (QSORSA): there is no W to put back

Each state says how to get W from what is stored, and what a layer may do in it.
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
    """What a state needs of its layer; `AdaptedWeight` and `MergeableWeight` document the methods."""

    name: str
    weight_state: WeightState
    sorsa_factors: nn.ModuleDict

    @property
    def merged(self) -> bool:
        """Whether an adapter is merged into the weight."""

    def get_base_layer(self) -> Any:
        """The base module."""

    def factors(self, adapter_name: str) -> SORSAFactors:
        """An adapter's tensors, ready or not."""

    def ready_factors(self, adapter_name: str) -> SORSAFactors:
        """An adapter's tensors, loaded and checked against the base weight."""

    def delta_to_weight(self, delta: torch.Tensor) -> torch.Tensor:
        """A change (out x in) in the shape of the base weight."""

    def stored_weight(self) -> nn.Parameter:
        """What the base module stores for W."""

    def store_weight(self, stored: nn.Parameter) -> None:
        """Make the base module store this, in the form that `stored_weight` gives."""

    def as_stored(self, weight: torch.Tensor, original: nn.Parameter) -> nn.Parameter:
        """A weight (shape of the base weight, fp32 at least) in the form in which `original` is stored."""

    def merged_weight(self, names: list[str], safe: bool = False) -> torch.Tensor:
        """W plus the changes of the named adapters, in fp32 at least, in the shape of the base weight."""


class WeightState:
    """A state. The defaults are those of an intact weight.

    Attributes:
        adapter: the adapter whose initial triplets the stored weight lacks; None if it lacks none.
    """

    adapter: str | None

    is_whole: ClassVar[bool] = False
    """Whether the base module stores W itself."""

    is_residual: ClassVar[bool] = False
    """Whether the base module stores a residual for good."""

    # -- reading and writing ----------------------------------------------------------------------------------------

    def shown(self, layer: StoredLayer) -> torch.Tensor:
        """W in the shape and dtype of the stored weight, for code that reads it off a layer that is not merged.

        The residual, if the base module has nothing else.
        """
        return layer.get_base_layer().weight

    def full(self, layer: StoredLayer, weight: torch.Tensor) -> torch.Tensor:
        """W from the stored weight, in the same shape and on the same device.

        Args:
            layer: the layer.
            weight: the stored weight, read as a plain matrix (the base weight's shape) in fp32 at least.
        """
        return weight

    @contextmanager
    def intact_weight(self, layer: StoredLayer) -> Iterator[None]:
        """In this context the base module shows W; the residual, if it has nothing else."""
        yield

    def rewrite(self, layer: StoredLayer) -> None:
        """Write the stored weight again, after a file may have replaced the initial triplets."""

    def moved(self, fn: Callable[[torch.Tensor], torch.Tensor]) -> WeightState:
        """The state after the tensors that it keeps went through `fn`, which moves or casts a tensor of any shape."""
        return self

    def restore(self, layer: StoredLayer) -> None:
        """Make the base module store W.

        Raises:
            FoldError: it cannot store W.
        """

    # -- adapters come and go ---------------------------------------------------------------------------------------

    def refuse_beside(self, layer: StoredLayer, adapter_name: str, rank: int) -> None:
        """Raises FoldError if no adapter of this name and rank can be added."""

    def refuse_to_factorise(self, layer: StoredLayer, adapter_name: str) -> None:
        """Raises FoldError if the stored weight lacks the triplets that a factorisation would look for."""

    def refuse_mixed_batch(self) -> None:
        """Raises FoldError if rows of a batch cannot use different adapters."""

    def needs(self, layer: StoredLayer, adapter_name: str) -> bool:
        """Whether this adapter alone holds the triplets that the stored weight lacks for good."""
        return False

    def refuse_to_delete(self, layer: StoredLayer, adapter_name: str) -> None:
        """Raises FoldError if the stored weight needs the adapter; see `needs`."""

    def before_delete(self, layer: StoredLayer, adapter_name: str) -> None:
        """Prepare the layer for the deletion of an adapter.

        Raises:
            FoldError: the stored weight needs the adapter.
        """

    def before_unload(self, layer: StoredLayer, merging: bool) -> None:
        """Prepare the base module to go on without its layer, merged or not. It must then hold W, or the merge of W.

        Raises:
            FoldError: nothing is merged, and W cannot be put back.
        """

    def after_unload(self, layer: StoredLayer) -> None:
        """Finish what `before_unload` began, once PEFT has taken the layer off."""


@dataclass(frozen=True)
class Intact(WeightState):
    """The base module stores W."""

    adapter: None = None
    is_whole: ClassVar[bool] = True


@dataclass(frozen=True)
class Folded(WeightState):
    """The base module stores W - U0 S0 V0^T; see `folding.py`.

    Attributes:
        intact: W as it was stored, in its own shape and dtype.
    """

    adapter: str
    intact: torch.Tensor

    def shown(self, layer: StoredLayer) -> torch.Tensor:
        """The kept W, in the shape and dtype of the stored weight."""
        return self.intact

    def full(self, layer: StoredLayer, weight: torch.Tensor) -> torch.Tensor:
        """The kept W in the dtype of `weight`, same shape: what is stored is not read."""
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
        """See `WeightState.rewrite`. Computes in fp32 at least, and rounds once."""
        initial = layer.delta_to_weight(layer.ready_factors(self.adapter).initial_matrix())
        total = self.intact.to(torch.promote_types(self.intact.dtype, torch.float32)) - initial.to(self.intact.device)
        layer.get_base_layer().weight.data = total.to(self.intact.dtype)

    def moved(self, fn: Callable[[torch.Tensor], torch.Tensor]) -> WeightState:
        """The state with the kept W (any shape) moved or cast by `fn`."""
        return replace(self, intact=fn(self.intact))

    @torch.no_grad()
    def restore(self, layer: StoredLayer) -> None:
        """See `WeightState.restore`.

        Raises:
            FoldError: an adapter is merged into the layer.
        """
        if layer.merged:
            raise FoldError(
                f"{layer.name} is merged, and unfolding would lose the change. Call unmerge_adapter() first."
            )
        weight = layer.get_base_layer().weight
        weight.data = self.intact.to(weight.device)
        layer.weight_state = Intact()

    def refuse_beside(self, layer: StoredLayer, adapter_name: str, rank: int) -> None:
        """Raises FoldError always: a folded layer has one adapter."""
        raise FoldError(
            f"{layer.name} is folded, and a folded layer has one adapter: {adapter_name!r} cannot be added beside "
            f"{self.adapter!r}. Call unfold() first."
        )

    def refuse_to_factorise(self, layer: StoredLayer, adapter_name: str) -> None:
        """Raises FoldError always: the stored weight lacks the folded adapter's triplets."""
        _refuse_other_triplets(layer, self.adapter, adapter_name)

    def refuse_mixed_batch(self) -> None:
        """Raises FoldError always."""
        raise FoldError("Cannot pass `adapter_names` while the model is folded, please call `unfold()` first.")

    def before_delete(self, layer: StoredLayer, adapter_name: str) -> None:
        """Unfold, which puts W back.

        Raises:
            FoldError: an adapter is merged into the layer.
        """
        self.restore(layer)

    def before_unload(self, layer: StoredLayer, merging: bool) -> None:
        """Leave W, or the merge of it, in the base module."""
        if layer.merged:  # the base layer stores W and the change already
            layer.weight_state = Intact()
        else:
            self.restore(layer)


class Mark(Protocol):
    """A note on a model that its weights are residuals."""

    def forget(self) -> None:
        """Delete the note: the weights are whole again."""


@dataclass(frozen=True)
class Residual(WeightState):
    """The base module stores the quantised residual of W, for good; see `qsorsa/residual.py`.

    Attributes:
        mark: the note in the model's config; forgotten when W is whole again.
    """

    adapter: str
    mark: Mark

    is_residual: ClassVar[bool] = True

    def full(self, layer: StoredLayer, weight: torch.Tensor) -> torch.Tensor:
        """W = stored residual + U0 S0 V0^T, in the shape of the stored weight, fp32."""
        initial = layer.factors(self.adapter).initial_matrix()
        return weight + layer.delta_to_weight(initial).to(weight.device)

    def restore(self, layer: StoredLayer) -> None:
        """Raises FoldError always: there is no W to put back."""
        raise FoldError(
            f"The base model stores a quantised residual of {layer.name}, so there is no W to put back. Merge with "
            "merge_and_unload() or merge_and_dequantize(), or load the model that it was made from."
        )

    def refuse_beside(self, layer: StoredLayer, adapter_name: str, rank: int) -> None:
        """Raises FoldError if the rank differs from that of the stored residual."""
        known = layer.factors(self.adapter).rank if self.adapter in layer.sorsa_factors else rank
        if known != rank:
            raise FoldError(
                f"{layer.name} stores the residual of {known} singular triplets, so every adapter on it has rank "
                f"{known}; {adapter_name!r} has {rank}. Give it that rank."
            )

    def refuse_to_factorise(self, layer: StoredLayer, adapter_name: str) -> None:
        """Raises FoldError always: the stored weight lacks the residual's triplets."""
        _refuse_other_triplets(layer, self.adapter, adapter_name)

    def needs(self, layer: StoredLayer, adapter_name: str) -> bool:
        return not _others(layer, adapter_name)

    def refuse_to_delete(self, layer: StoredLayer, adapter_name: str) -> None:
        """Raises FoldError if no other adapter holds the triplets that the stored weight lacks."""
        if self.needs(layer, adapter_name):
            self.restore(layer)

    def before_delete(self, layer: StoredLayer, adapter_name: str) -> None:
        """Make another adapter the one that holds what the base lacks.

        Raises:
            FoldError: no other adapter holds that.
        """
        self.refuse_to_delete(layer, adapter_name)
        layer.weight_state = replace(self, adapter=_others(layer, adapter_name)[0])

    def before_unload(self, layer: StoredLayer, merging: bool) -> None:
        """Raises FoldError if nothing is merged and the caller does not merge either."""
        if not merging and not layer.merged:
            self.restore(layer)

    @torch.no_grad()
    def after_unload(self, layer: StoredLayer) -> None:
        """Store W, quantised again, if no adapter is merged into it. Forget the mark."""
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
