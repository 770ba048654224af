"""Folded layers: the base stores W_r = W - U0 S0 V0^T, so that a step costs y = x W_r^T + ((x V) * S) U^T.

The paper's stored form, with three products of r columns less than the intact form. What it costs: a second copy of
each adapted weight, from which unfolding restores W bit for bit; and that a new or disabled adapter gives the base
model's output only up to the rounding of W_r and of the products, 0.4% of them in bfloat16. Explicit, never automatic.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from peft.utils.constants import EMBEDDING_LAYER_NAMES
from torch import nn

from ..errors import FoldError
from ..linalg.precision import full_precision
from ..regularizer.trained_factors import sorsa_layers

if TYPE_CHECKING:
    from ..qsorsa.full_precision_weights import FullPrecisionWeights
    from .layer import SORSALayer


class Folded(NamedTuple):
    """The state of a folded layer: the adapter whose initial triplets were taken out of W, and W as it was stored;
    None where the base model has stored the residual from the start (`residual.py`): then it is folded for good."""

    adapter: str
    intact: torch.Tensor | None


class Foldable(nn.Module):
    """What a layer needs to be folded; a part of `SORSALayer`.

    Attributes:
        full_precision: where W is read from, until the base stores its residual (`residual.py`).
        rounding: relative error of W as it was quantised, and with the residual quantised; None where it was not.
        foldable: whether the kind's `forward` hands the base output of a folded layer to `complete`.
        quantised: whether what the base stores is rounded to a few bits, so that `fold` would round it anew.
        folded: the state, or None while the base layer stores W.
    """

    foldable = False
    quantised = False
    folded: Folded | None = None
    full_precision: FullPrecisionWeights | None = None
    rounding: tuple[float, float] | None = None

    def fold(self: SORSALayer) -> None:  # type: ignore[misc]
        """Store W - U0 S0 V0^T in the base layer; see `fold_layer`."""
        fold_layer(self)

    def unfold(self: SORSALayer) -> None:  # type: ignore[misc]
        """Put W back, bit for bit; see `unfold_layer`."""
        unfold_layer(self)

    def refuse_beside_folded(self: SORSALayer, adapter_name: str, rank: int) -> None:  # type: ignore[misc]
        """Raises FoldError where `fold` took an adapter's triplets out of the weight, or it stores the residual of
        triplets of another rank."""
        if self.folded is None:
            return
        if self.folded.intact is not None:
            raise FoldError(
                f"{self.name} is folded, and a folded layer has one adapter: {adapter_name!r} cannot be added beside "
                f"{self.folded.adapter!r}. Call unfold() first."
            )
        known = self.factors(self.folded.adapter).rank if self.folded.adapter in self.sorsa_factors else rank
        if known != rank:
            raise FoldError(
                f"{self.name} stores the residual of {known} singular triplets, so every adapter on it has rank "
                f"{known}; {adapter_name!r} has {rank}. Give it that rank."
            )

    def refuse_to_factorise_residual(self: SORSALayer, adapter_name: str) -> None:  # type: ignore[misc]
        """Raises FoldError where the stored weight lacks the triplets that a factorisation would look for."""
        if self.folded is not None:
            raise FoldError(
                f"{self.name} stores the residual of the triplets of {self.folded.adapter!r}, and {adapter_name!r} "
                "cannot start from others. Give it the same svd, svd_seed and svd_energy."
            )

    def leave_folded(self: SORSALayer, adapter_name: str) -> None:  # type: ignore[misc]
        """Before an adapter is deleted: put W back, or where the base stores a residual, name another adapter that
        holds what it lacks.

        Raises:
            FoldError: there is no other.
        """
        self.refuse_to_leave(adapter_name)
        if self.folded is not None and self.folded.intact is None:
            self.folded = Folded(self._others(adapter_name)[0], None)
        else:
            self.unfold()

    def refuse_to_leave(self: SORSALayer, adapter_name: str) -> None:  # type: ignore[misc]
        """Raises FoldError where the base stores a residual and no other adapter holds what it lacks."""
        if self.is_needed(adapter_name):
            refuse_residual(self)

    def is_needed(self: SORSALayer, adapter_name: str) -> bool:  # type: ignore[misc]
        """Whether the base stores a residual and no other adapter holds what it lacks."""
        return self.folded is not None and self.folded.intact is None and not self._others(adapter_name)

    def _others(self: SORSALayer, adapter_name: str) -> list[str]:  # type: ignore[misc]
        return [name for name in self.sorsa_factors if name != adapter_name]

    def _apply(self, fn: Any, recurse: bool = True) -> Foldable:
        """Take the kept weight along to another device or dtype."""
        super()._apply(fn, recurse)
        if self.folded is not None and self.folded.intact is not None:
            self.folded = self.folded._replace(intact=fn(self.folded.intact))
        return self


def fold_model(model: nn.Module) -> None:
    """Fold every adapted layer of a model, or none; layers whose adapter was deleted are not adapted.

    Raises:
        FoldError: a layer cannot be folded; it is named, and what to do.
    """
    layers = [layer for layer in sorsa_layers(model) if layer.configs]
    for layer in layers:
        check_foldable(layer)
        _check_unshared(layer, model)
    for layer in layers:
        fold_layer(layer)


@torch.no_grad()
def fold_layer(layer: SORSALayer) -> None:
    """Store W - U0 S0 V0^T in the base layer, computed in fp32 at least and rounded once; W is kept.

    Does nothing to a layer that is folded.

    Raises:
        FoldError: see `check_foldable`. Whether another module shares the weight is checked by `fold_model` alone.
    """
    if layer.folded is None:
        adapter = check_foldable(layer)
        layer.folded = Folded(adapter, layer.get_base_layer().weight.data)
        refold(layer)


@torch.no_grad()
@full_precision()
def refold(layer: SORSALayer) -> None:
    """Write the residual of the kept weight and the adapter's initial triplets, which a file may have replaced."""
    assert layer.folded is not None
    adapter, intact = layer.folded
    if intact is None:
        return
    initial = layer.delta_to_weight(layer.ready_factors(adapter).initial_matrix())
    total = intact.to(torch.promote_types(intact.dtype, torch.float32)) - initial.to(intact.device)
    layer.get_base_layer().weight.data = total.to(intact.dtype)


@torch.no_grad()
def unfold_layer(layer: SORSALayer) -> None:
    """Put the kept weight back, bit for bit; does nothing to a layer that is not folded.

    Raises:
        FoldError: the adapter is merged into it, or it is folded for good.
    """
    refuse_residual(layer)
    if layer.folded is None:
        return
    if layer.merged:
        raise FoldError(f"{layer.name} is merged, and unfolding would lose the change. Call unmerge_adapter() first.")
    assert layer.folded.intact is not None
    weight = layer.get_base_layer().weight
    weight.data = layer.folded.intact.to(weight.device)
    layer.folded = None


def refuse_residual(layer: SORSALayer) -> None:
    """Raises FoldError where a layer is folded for good."""
    if layer.folded is not None and layer.folded.intact is None:
        raise FoldError(
            f"The base model stores a quantised residual of {layer.name}, so there is no W to put back. Merge with "
            "merge_and_unload() or merge_and_dequantize(), or load the model that it was made from."
        )


@contextmanager
def intact_weight(layer: SORSALayer) -> Iterator[None]:
    """In this context the base layer shows W, folded or not; where it is folded for good, the residual."""
    if layer.folded is None or layer.folded.intact is None:
        yield
        return
    weight = layer.get_base_layer().weight
    stored, weight.data = weight.data, layer.folded.intact
    try:
        yield
    finally:
        weight.data = stored


def with_removed(layer: SORSALayer, weight: torch.Tensor) -> torch.Tensor:
    """W from what the base stores (in its shape): where that is the residual for good, with the triplets it lacks."""
    if layer.folded is None or layer.folded.intact is not None:
        return weight
    return weight + layer.delta_to_weight(layer.factors(layer.folded.adapter).initial_matrix()).to(weight.device)


def check_foldable(layer: SORSALayer) -> str:
    """The name of the adapter that can be folded into a layer.

    Raises:
        FoldError: it has no or several adapters, one with dropout, merged, not loaded, or on a sharded, offloaded
            or trained weight; or the layer is of a kind that does not fold, or an embedding, which PEFT saves with the
            adapter.
    """
    adapters = list(layer.sorsa_factors)
    weight = layer.base_weight()
    engine = next((name for name in ("FSDP", "DEEPSPEED") if _announced(name)), None)
    if hasattr(weight, "device_mesh") or hasattr(weight, "ds_id") or getattr(weight, "_is_fsdp_flattened", False):
        engine = engine or "FSDP, tensor parallelism or DeepSpeed"
    problems = {
        "its kind has no folded form; leave it out of target_modules, or train intact": not layer.foldable,
        "its weight is quantised, and would be rounded anew; a quantised residual is made from full precision, with "
        "residual_base=True": layer.quantised,
        f"it has {len(adapters)} adapters ({', '.join(adapters)}); expected one, delete the others": len(adapters) != 1,
        "an adapter is merged into it; call unmerge_adapter() first": layer.merged,
        f"{engine} shards the weights, and the kept copies would not be; train intact": engine is not None,
        "its weight is on the meta device; load the base model first": weight.is_meta,
        "its weight trains, and unfolding would lose what it learned; freeze it, or train intact": weight.requires_grad,
        "PEFT saves embeddings with the adapter, and would save the residual; leave it out of target_modules": (
            layer.name.rpartition(".")[2] in EMBEDDING_LAYER_NAMES
        ),
        "its sorsa_dropout is not zero, and would drop the whole of U S V^T; set it to 0": any(
            config.sorsa_dropout > 0 for config in layer.configs.values()
        ),
    }
    problem = next((sentence for sentence, found in problems.items() if found), None)
    if problem is not None:
        raise FoldError(f"{layer.name} cannot be folded: {problem}.")
    layer.ready_factors(adapters[0])
    return adapters[0]


def _announced(engine: str) -> bool:
    """Whether accelerate has announced an engine that shards weights."""
    return os.environ.get(f"ACCELERATE_USE_{engine}", "false").lower() == "true"


def _check_unshared(layer: SORSALayer, model: nn.Module) -> None:
    base = layer.get_base_layer()
    storage = base.weight.untyped_storage().data_ptr()
    for name, module in model.named_modules():
        if module is base or not storage:
            continue
        for parameter in module.parameters(recurse=False):
            if parameter is base.weight or (
                not parameter.is_meta and parameter.untyped_storage().data_ptr() == storage
            ):
                raise FoldError(
                    f"{layer.name} cannot be folded: it shares its weight with {name}, which would read the residual. "
                    "Leave it out of target_modules, or train intact."
                )
