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

from .errors import FoldError
from .lowrank import Parts, add_product, input_gradient, own_tensor, product_of_rows
from .precision import full_precision
from .regularizer import sorsa_layers

if TYPE_CHECKING:
    from .layer import SORSALayer


class Folded(NamedTuple):
    """The state of a folded layer: the adapter whose initial triplets were taken out of W, and W as it was stored."""

    adapter: str
    intact: torch.Tensor


class Foldable(nn.Module):
    """What a layer needs to be folded; a part of `SORSALayer`.

    Attributes:
        foldable: whether the kind's `forward` hands the base output of a folded layer to `complete`.
        folded: the state, or None while the base layer stores W.
    """

    foldable = False
    folded: Folded | None = None

    def fold(self: SORSALayer) -> None:  # type: ignore[misc]
        """Store W - U0 S0 V0^T in the base layer; see `fold_layer`."""
        fold_layer(self)

    def unfold(self: SORSALayer) -> None:  # type: ignore[misc]
        """Put W back, bit for bit; see `unfold_layer`."""
        unfold_layer(self)

    def refuse_beside_folded(self: SORSALayer, adapter_name: str) -> None:  # type: ignore[misc]
        """Raises FoldError where an adapter is folded into the weight already."""
        if self.folded is not None:
            raise FoldError(
                f"{self.name} is folded, and a folded layer has one adapter: {adapter_name!r} cannot be added beside "
                f"{self.folded.adapter!r}. Call unfold() first."
            )

    def _apply(self, fn: Any, recurse: bool = True) -> Foldable:
        """Take the kept weight along to another device or dtype."""
        super()._apply(fn, recurse)
        if self.folded is not None:
            self.folded = self.folded._replace(intact=fn(self.folded.intact))
        return self


def fold_model(model: nn.Module) -> None:
    """Fold every adapted layer of a model, or none.

    Raises:
        FoldError: a layer cannot be folded; it is named, and what to do.
    """
    layers = sorsa_layers(model)
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
    parts = layer.ready_factors(adapter).parts()
    initial = layer.delta_to_weight((parts.U0 * parts.S0) @ parts.V0.mT)
    total = intact.to(torch.promote_types(intact.dtype, torch.float32)) - initial.to(intact.device)
    layer.get_base_layer().weight.data = total.to(intact.dtype)


@torch.no_grad()
def unfold_layer(layer: SORSALayer) -> None:
    """Put the kept weight back, bit for bit; does nothing to a layer that is not folded.

    Raises:
        FoldError: the adapter is merged into it.
    """
    if layer.folded is None:
        return
    if layer.merged:
        raise FoldError(f"{layer.name} is merged, and unfolding would lose the change. Call unmerge_adapter() first.")
    weight = layer.get_base_layer().weight
    weight.data = layer.folded.intact.to(weight.device)
    layer.folded = None


@contextmanager
def intact_weight(layer: SORSALayer) -> Iterator[None]:
    """In this context the base layer shows W, folded or not."""
    if layer.folded is None:
        yield
        return
    weight = layer.get_base_layer().weight
    stored, weight.data = weight.data, layer.folded.intact
    try:
        yield
    finally:
        weight.data = stored


def check_foldable(layer: SORSALayer) -> str:
    """The name of the adapter that can be folded into a layer.

    Raises:
        FoldError: it has no or several adapters, one with dropout, merged, not loaded, or on a sharded or offloaded
            weight; or the layer is of a kind that does not fold, or an embedding, which PEFT saves with the adapter.
    """
    adapters = list(layer.sorsa_factors)
    weight = layer.base_weight()
    engine = next((name for name in ("FSDP", "DEEPSPEED") if _announced(name)), None)
    if hasattr(weight, "device_mesh") or hasattr(weight, "ds_id") or getattr(weight, "_is_fsdp_flattened", False):
        engine = engine or "FSDP, tensor parallelism or DeepSpeed"
    problems = {
        "its kind has no folded form; leave it out of target_modules, or train intact": not layer.foldable,
        f"it has {len(adapters)} adapters ({', '.join(adapters)}); expected one, delete the others": len(adapters) != 1,
        "an adapter is merged into it; call unmerge_adapter() first": layer.merged,
        f"{engine} shards the weights, and the kept copies would not be; train intact": engine is not None,
        "its weight is on the meta device; load the base model first": weight.is_meta,
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


def complete(layer: SORSALayer, y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """What a folded layer's base output lacks: U S V^T, or U0 S0 V0^T where the adapter is not in use.

    Args:
        y: output of the folded base layer (... x out), fresh: it is written to.
        x: input (... x in).
    """
    assert layer.folded is not None
    if layer.merged:
        return y
    parts = layer.ready_factors(layer.folded.adapter).parts()
    if layer.folded.adapter in layer.adapters_in_use():
        return add_triplets(y, x, parts)
    with torch.autocast(y.device.type, enabled=False):
        U0, S0, V0 = (part.to(y.dtype) for part in parts[3:])
        return y + ((x.to(y.dtype) @ V0) * S0) @ U0.mT


def add_triplets(y: torch.Tensor, x: torch.Tensor, parts: Parts, weight: torch.Tensor | None = None) -> torch.Tensor:
    """y + ((x V) * S) U^T in the dtype of y, which is consumed; `weight` and the rest as in `lowrank.add_low_rank`."""
    if torch.compiler.is_compiling():
        U, S, V = (part.to(y.dtype) for part in parts.current())
        return y + ((x.to(y.dtype) @ V) * S) @ U.mT
    return _AddTriplets.apply(own_tensor(y), x, weight, *parts)


class _AddTriplets(torch.autograd.Function):
    """With C = x V, G = (g U) * S and K = g^T C: grad x = G V^T, dU = K * S, dS = diag(U^T K), dV = x^T G."""

    @staticmethod
    def forward(
        ctx: Any, y: torch.Tensor, x: torch.Tensor, weight: torch.Tensor | None, *tensors: torch.Tensor
    ) -> torch.Tensor:
        with torch.autocast(y.device.type, enabled=False):
            U, S, V = (part.to(y.dtype) for part in Parts(*tensors).current())
            C = x.to(y.dtype) @ V
            add_product(y, C * S, U)
        ctx.mark_dirty(y)
        ctx.save_for_backward(x, C, weight, *tensors)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, C, weight, *tensors = ctx.saved_tensors
        grad_x = grad_U = grad_S = grad_V = None
        with torch.autocast(g.device.type, enabled=False):
            U, S, V = Parts(*tensors).current()
            G = (g @ U.to(g.dtype)) * S.to(g.dtype)
            if ctx.needs_input_grad[1]:
                grad_x = input_gradient(g, G, V.to(g.dtype), weight).to(x.dtype)
            if any(ctx.needs_input_grad[3:6]):
                K = product_of_rows(g, C).to(S.dtype)
                grad_U = (K * S).to(tensors[0].dtype)
                grad_S = (K * U).sum(0).to(tensors[1].dtype)
                grad_V = product_of_rows(x.to(g.dtype), G).to(tensors[2].dtype)
        return g, grad_x, None, grad_U, grad_S, grad_V, None, None, None


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
