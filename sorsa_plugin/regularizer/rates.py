"""Reads the learning rates of the factors' parameter groups when the regularizer attaches, and says what is unusual."""

from __future__ import annotations

from typing import Any

from ..errors import AttachError
from ..learning_rate import suggested_rate
from ..rank_zero import say
from .engines import Engine
from .optimizers import groups_by_parameter, peak_rate, planned_rate
from .trained_factors import trainable_factors, trained_adapters

LARGEST_RATIO = 4.0
"""A rate of S above this many times that of U is logged once; LoRA+ advises 16 for LoRA's B."""


def look_at_rates(layers: list[Any], engine: Engine, required: bool) -> None:
    """Read the peak rates of the factors' groups, and log what is unusual about them, each in one line.

    Args:
        layers: the layers that the regularizer attaches to.
        engine: knows the factors' places in the optimizer.
        required: whether the regularizer acts, so that a rate must be positive.

    Raises:
        AttachError: none of them is positive, and one is required.
    """
    factors = trainable_factors(layers)
    peaks = [peak_rate(share.group) for share in engine.shares(factors) if share.group is not None]
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
    peak = max(peaks, default=0.0)
    if peak > 0.0 and "adam" in type(engine.optimizer).__name__.lower():  # what is known about rates is Adam's
        _advise(peak, layers, rank=max(factor.initial.shape[-1] for factor in factors))
    ratio = _rate_of_singular_values(layers, engine)
    if ratio > LARGEST_RATIO:
        say(
            "S trains at %g times the learning rate of U and V. PEFT's LoRA+ does that: it takes every tensor of one "
            "dimension for LoRA's B, and SORSA has no B. Use a plain optimizer unless you mean it.", ratio,
        )  # fmt: skip


def _advise(peak: float, layers: list[Any], rank: int) -> None:
    """Log one line if the peak learning rate is far from what is known to train well."""
    width = max(min(layer.in_features, layer.out_features) for layer in layers)  # of the residual stream, as a rule
    suggested = suggested_rate(width, rank)
    if not suggested.low <= peak <= suggested.high:
        say(
            "The learning rate %g is far %s what suits SORSA at width %d and rank %d: try %g (%g to %g). What is "
            "known: `sorsa advise`, docs/hyperparameters.md.",
            peak, "below" if peak < suggested.low else "above", width, rank,
            suggested.rate, suggested.low, suggested.high,
        )  # fmt: skip


def _rate_of_singular_values(layers: list[Any], engine: Engine) -> float:
    """The largest rate of an adapter's S in units of its U's; 1 where the optimizer steps other tensors than these."""
    groups, ratios = groups_by_parameter(engine.optimizer), [1.0]
    for _, _, tensors in trained_adapters(layers):
        S, U = (groups.get(id(tensor)) for tensor in (tensors.dS, tensors.dU))
        if S is not None and U is not None and planned_rate(U) > 0.0:
            ratios.append(planned_rate(S) / planned_rate(U))
    return max(ratios)
