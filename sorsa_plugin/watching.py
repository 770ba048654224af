"""Regularizes where nobody called `attach`: a hook on every optimizer's step looks for SORSA factors in it.

So `get_peft_model(model, SORSAConfig())` and any training loop are a complete run.
"""

from __future__ import annotations

from typing import Any

from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook

from .attachment import attach_layers, attachments, groups_by_parameter, say
from .errors import AttachError
from .layer import live_layers
from .regularizer import trainable_factors

_watching = False


def watch_optimizers() -> None:
    """Make the first step of an optimizer that owns SORSA factors attach by itself; installed once per process."""
    global _watching
    if not _watching:
        register_optimizer_step_pre_hook(_attach_at_first_step)
        _watching = True


def _attach_at_first_step(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    if optimizer in attachments:
        return
    groups = groups_by_parameter(optimizer)
    trained = [layer for layer in list(live_layers) if layer.trainable_adapters()]
    owned = [layer for layer in trained if any(id(f.offset) in groups for f in trainable_factors([layer]))]
    if not owned:
        _refuse_hidden_factors(trained, optimizer)
        return
    order = {id(p): i for i, p in enumerate(p for group in optimizer.param_groups for p in group["params"])}
    owned.sort(key=lambda layer: min(order.get(id(f.offset), len(order)) for f in trainable_factors([layer])))
    settings = attach_layers(owned, optimizer, None).settings()
    say(
        "SORSA's orthonormal regularizer attached itself to %s at its first step: gamma %g, %s, %d factors.",
        type(optimizer).__name__, settings.gamma, settings.update, len(trainable_factors(owned)),
    )  # fmt: skip


def _refuse_hidden_factors(trained: list[Any], optimizer: Optimizer) -> None:
    regularized = [
        layer for layer in trained if any(layer.configs[name].resolved_gamma > 0 for name in layer.trainable_adapters())
    ]
    for factor in trainable_factors(regularized):
        if hasattr(factor.offset, "ds_id") or hasattr(factor.offset, "_hp_mapping"):
            raise AttachError(
                f"DeepSpeed steps {factor.name} through a flat partition in {type(optimizer).__name__}, where the "
                "regularizer cannot reach it. Use DDP or FSDP2, or set gamma=0 to train without the regularizer."
            )
