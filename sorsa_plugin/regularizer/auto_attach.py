"""Attaches the regularizer if nobody called `attach`: a hook on every optimizer's step looks for SORSA factors in it.

So `get_peft_model(model, SORSAConfig())` and any training loop are a complete run.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook

from ..errors import AttachError
from ..layers.layer import SORSALayer, live_layers
from ..plugins import manager
from ..rank_zero import say
from .attach import attach_layers
from .engines import Engine
from .optimizers import ETA_MAX, groups_by_parameter, innermost, only_makes_state
from .step_hooks import attachment_of, attachments, is_part_of_a_step
from .trained_factors import Adapter, factors_of, trainable_factors

_watching = False


def watch_optimizers() -> None:
    """Make an optimizer that owns SORSA factors attach by itself at its first step. Installed once per process."""
    global _watching
    if not _watching:
        register_optimizer_step_pre_hook(_attach_at_first_step)
        _watching = True


@torch.compiler.disable
def _attach_at_first_step(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    if innermost(optimizer) in attachments:
        _follow_new_layers(innermost(optimizer))
        return
    if is_part_of_a_step(optimizer) or _hands_on_to_an_attached_one(optimizer):
        return
    living = _living_layers(optimizer)
    trained = [layer for layer in living if layer.trained()]
    factors = trainable_factors(trained)
    try:
        engine: Engine | None = manager().hook.sorsa_engine(factors=factors, optimizer=optimizer) if factors else None
    except AttachError:
        if any(map(_is_regularized, trained)):
            raise
        return
    if engine is None:
        _refuse_hidden_factors([layer for layer in trained if _is_regularized(layer)], optimizer)
        return
    if only_makes_state(optimizer, kwargs):  # torch.distributed.checkpoint then loads the keys that exist
        for share in engine.shares(factors):
            if share.group is not None:
                share.group.setdefault(ETA_MAX, 0.0)
        return
    owned = [layer for layer in trained if any(map(engine.owns, trainable_factors([layer])))]
    adapters = {(id(layer.family), name) for layer in owned for name in layer.trained()}
    # All layers of these adapters, as in attach(): F counts the factors that another optimizer steps too. What is
    # frozen now may train later, and so may other adapters that the optimizer has.
    layers = [
        layer
        for layer in living
        if adapters & {(id(layer.family), name) for name in layer.sorsa_factors} or _is_stepped(layer, engine)
    ]
    settings = attach_layers(layers, engine, None).settings()
    say(
        "SORSA's orthonormal regularizer attached itself to %s at its first step: gamma %g, %s, %d factors.",
        type(optimizer).__name__, settings.gamma, settings.update, len(trainable_factors(owned)),
    )  # fmt: skip


def _follow_new_layers(optimizer: Optimizer) -> None:
    """Regularize layers that were adapted after the optimizer was attached to, if it was given their parameters."""
    attachment = attachment_of(optimizer)
    now = SORSALayer.adapters_made, sum(len(group["params"]) for group in optimizer.param_groups)
    if attachment is None or attachment.looked == now or attachment.since == now[0]:  # as in nearly every step
        return
    attachment.looked, known = now, set(attachment.layers)
    new = [layer for layer in _living_layers(optimizer) if layer.changed > attachment.since and layer not in known]
    layers = [layer for layer in new if _is_stepped(layer, attachment.engine)]
    if layers:
        attach_layers(layers, attachment.engine, None)
        say("SORSA's orthonormal regularizer takes in %d layers that were adapted since.", len(layers))


def _is_stepped(layer: SORSALayer, engine: Engine) -> bool:
    """Whether the optimizer has one of the layer's adapters, active or not."""
    adapters = [Adapter(layer, name, layer.factors(name)) for name in layer.sorsa_factors]
    return any(map(engine.owns, factors_of(adapters)))


def _hands_on_to_an_attached_one(optimizer: Optimizer) -> bool:
    """Whether the optimizer holds an attached one for its parameters, whose step its own will call."""
    held = [
        part for value in vars(optimizer).values() for part in (value if isinstance(value, list | tuple) else [value])
    ]
    attached = [part for part in held if isinstance(part, Optimizer) and attachment_of(part) is not None]
    mine = groups_by_parameter(optimizer) if attached else {}
    return any(not mine.keys().isdisjoint(groups_by_parameter(part)) for part in attached)


def _living_layers(optimizer: Optimizer) -> list[Any]:
    """Every layer, in an order that is the same on all processes: by the optimizer's parameters, then by age."""
    order = {parameter: number for number, parameter in enumerate(groups_by_parameter(optimizer))}

    def place(layer: Any) -> tuple[int, int]:
        places = (order.get(id(factor.offset), len(order)) for factor in trainable_factors([layer]))
        return min(places, default=len(order)), layer.number

    return sorted(live_layers(), key=place)


def _is_regularized(layer: Any) -> bool:
    return any(layer.configs[name].resolved_gamma > 0 for name in layer.trained())


def _refuse_hidden_factors(layers: list[Any], optimizer: Optimizer) -> None:
    """Raises AttachError if the optimizer owns no factor but flat memory that contains one: it would step it unseen."""
    owned = {_memory(parameter) for group in optimizer.param_groups for parameter in group["params"]} - {0}
    for factor in trainable_factors(layers):
        if factor.offset.numel() and _memory(factor.offset) in owned:
            raise AttachError(
                f"{type(optimizer).__name__} steps {factor.name} as a part of a flat tensor, where the regularizer "
                "cannot reach it. Use DDP, FSDP2 or DeepSpeed ZeRO, or set gamma=0 to train without the regularizer."
            )


def _memory(tensor: torch.Tensor) -> int:
    """Address of a tensor's storage; 0 if it has none of its own (DTensors and other wrappers)."""
    return tensor.untyped_storage().data_ptr() if type(tensor.data) is torch.Tensor else 0
