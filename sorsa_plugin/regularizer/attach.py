"""Puts the regularizer on an optimizer, once, after checking that the optimizer can deliver it."""

from __future__ import annotations

import weakref
from typing import Any

from torch import nn
from torch.optim import LBFGS

from ..config import check_gamma
from ..errors import AttachError
from ..layers.layer import SORSALayer, sorsa_layers
from .engines import Engine, find_engine
from .fp32_factors import require_fp32
from .rates import look_at_rates
from .step_hooks import Attachment, attachment_of, attachments
from .trained_factors import model_factors


def attach(model: nn.Module, optimizer: Any, *, gamma: float | None = None) -> Attachment:
    """Deliver the regularizer of a model's trained SORSA adapters through an optimizer, from its next step on.

    A second call on the same optimizer returns the first attachment, with the new gamma if one is given. If it names
    another model, that model's layers are added.

    From then on, a step whose gradients are not finite raises NonFiniteGradientError; see `nonfinite_gradients.py`.

    Args:
        model: a model with trained SORSA adapters.
        optimizer: the torch optimizer that steps them, or a wrapper of one that a plug-in knows.
        gamma: overrides the adapters' gamma.

    Returns:
        The attachment, which gives metrics and can be detached.

    Raises:
        NoAdaptedLayersError: the model has no trained SORSA adapter.
        SORSAConfigError: gamma cannot be honoured.
        AttachError: the optimizer does not own the factors, has no positive peak learning rate, has rounded state, or
            cannot take this update (LBFGS, schedule-free); or the adapters ask for different regularizers.
    """
    factors = model_factors(model)
    attachment = attach_layers(sorsa_layers(model), find_engine(factors, optimizer), gamma)
    attachment.watch.stops = True
    return attachment


def attach_layers(layers: list[Any], engine: Engine, gamma: float | None) -> Attachment:
    """`attach` for the SORSA layers of one or several models, and the engine that steps them.

    Raises:
        SORSAConfigError, AttachError: see `attach`.
    """
    optimizer = engine.optimizer
    assert optimizer is not None
    known = attachment_of(optimizer)
    if known is not None and set(layers) <= set(known.layers):
        check_gamma(gamma, known.settings().update)
        known.gamma = known.gamma if gamma is None else gamma
        return known
    attachment = Attachment(layers, engine, gamma)
    attachment.since = SORSALayer.adapters_made
    settings = attachment.settings()
    check_gamma(settings.gamma, settings.update)
    if settings.update == "decoupled" and type(optimizer).__module__.startswith("schedulefree"):
        raise AttachError(
            "reg_update='decoupled' writes the parameters after the step, and a schedule-free optimizer keeps others "
            "in its state. Use reg_update='coupled' with it."
        )
    if settings.update == "coupled" and settings.gamma > 0.0 and isinstance(optimizer, LBFGS):
        raise AttachError(
            "LBFGS searches along a line by the loss that its closure returns, and reg_update='coupled' adds to the "
            "gradients alone. Use reg_update='decoupled' with it."
        )
    require_fp32(layers, engine)
    look_at_rates(layers, engine, required=known is None and settings.gamma > 0.0)
    if known is not None:  # attached already: the optimizer steps another model too
        attachment.layers = [*known.layers, *(layer for layer in layers if layer not in set(known.layers))]
        attachment.gamma = known.gamma if gamma is None else gamma
        attachment.settings()
        known.layers, known.gamma, known.engine = attachment.layers, attachment.gamma, engine
        return known
    attachment.handles = [
        optimizer.register_step_pre_hook(attachment.before_step),
        optimizer.register_step_post_hook(attachment.after_step),
    ]
    attachments[optimizer] = weakref.ref(attachment)
    return attachment
