"""Puts the regularizer on an optimizer, once, after checking that the optimizer can deliver it."""

from __future__ import annotations

import weakref
from typing import Any

from torch import nn
from torch.optim import LBFGS

from ..config import check_gamma
from ..errors import AttachError
from ..layers.layer import SORSALayer, sorsa_layers
from ..rank_zero import say
from .engines import Engine, find_engine
from .fp32_factors import require_fp32
from .optimizers import groups_by_parameter, peak_rate, planned_rate
from .step_hooks import Attachment, attachment_of, attachments
from .trained_factors import model_factors, trainable_factors, trained_adapters

ADVISED_LR = 1e-4
"""A peak learning rate above this is logged once: the published recipe uses 3e-5."""

LARGEST_RATIO = 4.0
"""A rate of S above this many times that of U is logged once; LoRA+ advises 16 for LoRA's B."""


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
    _look_at_rates(layers, engine, required=known is None and settings.gamma > 0.0)
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


def _look_at_rates(layers: list[Any], engine: Engine, required: bool) -> None:
    """Read the peak rates of the factors' groups, and log what is unusual about them.

    Raises:
        AttachError: none of them is positive, and one is required.
    """
    shares = [share for share in engine.shares(trainable_factors(layers)) if share.group is not None]
    peaks = [peak_rate(share.group) for share in shares if share.group is not None]
    resting = sum(peak <= 0.0 for peak in peaks)
    if peaks and resting == len(peaks) and required:
        raise AttachError(
            f"The peak learning rate of a parameter group with SORSA factors is {peaks[0]}; expected a positive one, "
            "because the regularizer's rate is gamma relative to it. Raise the learning rate (for Adafactor "
            "relative_step=False, scale_parameter=False, lr=...), freeze the adapter with requires_grad=False, or set "
            "gamma=0."
        )
    if resting and required:
        say(
            "%d of %d SORSA factors have the learning rate 0: they do not move, and are not regularized. "
            "requires_grad=False freezes them without gradients and optimizer state.", resting, len(peaks),
        )  # fmt: skip
    if max(peaks, default=0.0) > ADVISED_LR:
        say(
            "The learning rate %g is above %g: SORSA's factors have unit norm, the published recipe uses 3e-5. If the "
            "loss is unsteady, lower it.", max(peaks), ADVISED_LR,
        )  # fmt: skip
    ratio = _rate_of_singular_values(layers, engine)
    if ratio > LARGEST_RATIO:
        say(
            "S trains at %g times the learning rate of U and V. PEFT's LoRA+ does that: it takes every tensor of one "
            "dimension for LoRA's B, and SORSA has no B. Use a plain optimizer unless you mean it.", ratio,
        )  # fmt: skip


def _rate_of_singular_values(layers: list[Any], engine: Engine) -> float:
    """The largest rate of an adapter's S in units of its U's; 1 where the optimizer steps other tensors than these."""
    groups, ratios = groups_by_parameter(engine.optimizer), [1.0]
    for _, _, tensors in trained_adapters(layers):
        S, U = (groups.get(id(tensor)) for tensor in (tensors.dS, tensors.dU))
        if S is not None and U is not None and planned_rate(U) > 0.0:
            ratios.append(planned_rate(S) / planned_rate(U))
    return max(ratios)
