"""The adapted matrices of a model, counted by kind, shape and rank."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, replace

from peft import PeftModel

from ..layers.kinds.lending import LendingLayer
from ..layers.layer import sorsa_layers
from .empty_adapter import ADAPTER


@dataclass(frozen=True)
class LayerGroup:
    """Adapted matrices of one kind, shape and rank."""

    kind: str
    """Last part of the modules' or parameters' names."""
    shape: tuple[int, int]
    """(out, in)"""
    rank: int
    count: int
    """Number of matrices; every expert counts."""
    lent: bool = False
    """Whether the layer computes with its changed weight, which is kept for backward (`layers/kinds/lending.py`)."""


def layer_groups(model: PeftModel) -> tuple[LayerGroup, ...]:
    """The groups of a model with a SORSA adapter, in the model's order."""
    found: Counter[LayerGroup] = Counter()
    for layer in sorsa_layers(model):
        if ADAPTER in layer.sorsa_factors:  # tied layers use another's
            shape = (layer.out_features, layer.in_features)
            kind, rank = layer.name.rpartition(".")[2], layer.factors(ADAPTER).rank
            found[LayerGroup(kind, shape, rank, 0, isinstance(layer, LendingLayer))] += math.prod(layer.stack)
    return tuple(replace(group, count=count) for group, count in found.items())
