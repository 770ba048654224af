"""Suggests a learning rate for an adapter on a model, from the model's config alone: `sorsa advise`."""

from __future__ import annotations

from dataclasses import dataclass
from os import PathLike

from ..config import DEFAULT_GAMMA
from ..errors import SORSAConfigError
from ..files.base_checkpoint import read_model_config
from ..learning_rate import HEALTHY_GAP, LORA_SHARE, UNHEALTHY_GAP, SuggestedRate, one_digit, suggested_rate


@dataclass(frozen=True)
class Advice:
    """What `advise` found.

    Attributes:
        model: as it was given.
        width: the model's hidden size.
        rank: as it was given.
        learning_rate: where to start, the range around it, three rates to sweep, and what they rest on.
        gamma: the coupled default, to be left as it is.
        loss_weights: weight gamma / eta_max of the regularizer's loss at each rate of the sweep.
        healthy_gap, unhealthy_gap: mean gap up to which runs were as good as the best, and above which they were not.
        lora_learning_rate: the rate of LoRA that was given.
        rate_from_lora: the rate that it stands for, from one measurement; None without it.
    """

    model: str
    width: int
    rank: int
    learning_rate: SuggestedRate
    gamma: float
    loss_weights: tuple[float, ...]
    healthy_gap: float
    unhealthy_gap: float
    lora_learning_rate: float | None
    rate_from_lora: float | None


def advise(
    model: str | PathLike[str], rank: int, lora_learning_rate: float | None = None, revision: str | None = None
) -> Advice:
    """A learning rate to start from, with gamma and what to look at.

    Args:
        model: a directory with a config.json, or a hub id. No weights are read.
        rank: triplets trained per weight.
        lora_learning_rate: a rate at which LoRA trains well on the same task.
        revision: of the model on the hub.

    Raises:
        BaseFilesError: the model has no config that can be read.
        SORSAConfigError: rank or rate are not positive, or the config does not say how wide the model is.
    """
    for name, value in (("rank", rank), ("lora_learning_rate", lora_learning_rate)):
        if value is not None and not value > 0:
            raise SORSAConfigError(f"{name} is {value}; expected a number above 0.")
    width = getattr(read_model_config(model, revision).get_text_config(), "hidden_size", None)
    if not isinstance(width, int):
        raise SORSAConfigError(
            f"The config of {model} has no hidden_size, on which the advice rests. Take the rate of a model as "
            "wide from docs/hyperparameters.md."
        )
    rate = suggested_rate(width, rank)
    gamma = DEFAULT_GAMMA["coupled"]
    return Advice(
        model=str(model),
        width=width,
        rank=rank,
        learning_rate=rate,
        gamma=gamma,
        loss_weights=tuple(gamma / each for each in rate.sweep),
        healthy_gap=HEALTHY_GAP,
        unhealthy_gap=UNHEALTHY_GAP,
        lora_learning_rate=lora_learning_rate,
        rate_from_lora=None if lora_learning_rate is None else one_digit(lora_learning_rate * LORA_SHARE),
    )
