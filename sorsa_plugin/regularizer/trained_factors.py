"""Which factors an optimizer step regularizes, and the regularizer's loss over them; knows no optimizer.

L_reg = mean of the gaps over all F factors    (arXiv 2409.00055, section 3; the gap: `linalg/orthonormality.py`)
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from ..errors import NoAdaptedLayersError
from ..layers.layer import SORSALayer, sorsa_layers
from ..linalg.orthonormality import gap

if TYPE_CHECKING:
    from ..layers.factors import SORSAFactors


class Factor(NamedTuple):
    """One orthonormal factor P = initial + offset (rows x r) of one adapter, or a stack of them (E x rows x r)."""

    name: str
    initial: torch.Tensor
    offset: nn.Parameter

    @property
    def matrices(self) -> int:
        """The number of factors P: E for a stack, else 1."""
        return self.offset.shape[0] if self.offset.ndim == 3 else 1


class Adapter(NamedTuple):
    """One adapter on one layer."""

    layer: SORSALayer
    name: str
    tensors: SORSAFactors


def trained_adapters(layers: Iterable[SORSALayer]) -> list[Adapter]:
    """Every active, trainable adapter, in the layers' order."""
    return [Adapter(layer, name, tensors) for layer in layers for name, tensors in layer.trained().items()]


def trained_of(adapters: Iterable[Adapter]) -> list[Factor]:
    """Those of U and V of every adapter that train: each may be frozen by itself."""
    return [factor for factor in factors_of(adapters) if factor.offset.requires_grad]


def factors_of(adapters: Iterable[Adapter]) -> list[Factor]:
    """U and V of every adapter, frozen ones included."""
    found = []
    for layer, adapter, tensors in adapters:
        # read from the dictionaries: every optimizer step comes here, and attributes of modules are slow
        by_name: dict[str, Any] = {**tensors._buffers, **tensors._parameters}
        name = f"{layer.name}.{adapter}"
        found.append(Factor(f"{name}.U", by_name["U0"], by_name["dU"]))
        found.append(Factor(f"{name}.V", by_name["V0"], by_name["dV"]))
    return found


def trainable_factors(layers: Iterable[SORSALayer]) -> list[Factor]:
    """The trained ones of U and V of every active adapter, in the layers' order."""
    return trained_of(trained_adapters(layers))


def model_factors(model: nn.Module) -> list[Factor]:
    """`trainable_factors` of a model.

    Raises:
        NoAdaptedLayersError: it has none.
    """
    factors = trainable_factors(sorsa_layers(model))
    if not factors:
        raise NoAdaptedLayersError(
            f"{type(model).__name__} has no active, trainable SORSA adapter, so there is nothing to regularize. Wrap "
            "the model with get_peft_model(model, SORSAConfig(...)), or load its adapter with is_trainable=True."
        )
    return factors


def orthonormality(model: nn.Module) -> torch.Tensor:
    """L_reg of a model: the mean gap over its F trained factors, a scalar differentiable with respect to the offsets.

    Its gradient is the closed form of `gap`, smooth at orthonormal factors. Not for sharded parameters: use `attach`
    there.

    Raises:
        NoAdaptedLayersError: the model has no trained SORSA adapter.
    """
    factors = model_factors(model)
    found = [gap(factor.initial + factor.offset).reshape(-1) for factor in factors]
    return torch.cat([gaps.to(found[0].device) for gaps in found]).mean()
