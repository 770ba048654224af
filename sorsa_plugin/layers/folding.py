"""Folding: the base stores W_r = W - U0 S0 V0^T, so that a step costs y = x W_r^T + ((x V) * S) U^T.

This is the paper's stored form, with three products of r columns less than the intact form. It costs two things:

- A second copy of each adapted weight, from which unfolding restores W bit for bit.
- Exactness: a new or disabled adapter gives the base model's output only up to the rounding of W_r and of the products,
  0.4% of them in bfloat16.

Folding is explicit, never automatic.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
from torch import nn

from ..compat.peft import EMBEDDING_LAYER_NAMES
from ..errors import FoldError
from .base import AdaptedWeight
from .weight_state import Folded


def fold_layers(layers: Sequence[AdaptedWeight], model: nn.Module) -> None:
    """Fold layers of a model, all of them or none.

    Raises:
        FoldError: a layer cannot be folded; the message names it and says what to do.
    """
    for layer in layers:
        check_foldable(layer)
        _check_unshared(layer, model)
    for layer in layers:
        fold_layer(layer)


@torch.no_grad()
def fold_layer(layer: AdaptedWeight) -> None:
    """Store W - U0 S0 V0^T in the base layer, computed in fp32 at least and rounded once. W is kept.

    Does nothing to a layer that is already folded or stores a residual.

    Raises:
        FoldError: see `check_foldable`. Only `fold_layers` checks whether another module shares the weight.
    """
    if layer.weight_state.is_whole:
        adapter = check_foldable(layer)
        layer.weight_state = Folded(adapter, layer.get_base_layer().weight.data)
        layer.weight_state.rewrite(layer)


def check_foldable(layer: AdaptedWeight) -> str:
    """The name of the adapter that can be folded into a layer.

    Raises:
        FoldError: the layer's kind does not fold; it has no adapter or several; its adapter has dropout, is merged or
            is not loaded; its weight is quantised, sharded, offloaded or trained; or it is an embedding, which PEFT
            saves with the adapter.
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


def _check_unshared(layer: AdaptedWeight, model: nn.Module) -> None:
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
