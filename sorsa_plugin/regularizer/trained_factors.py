"""The orthonormal regularizer in closed form: gaps, loss and gradient of a set of factors; knows no optimizer.

    gap(P) = ||E||_F,  E = P^T P - I,    L_reg = mean of the gaps over all F factors    (arXiv 2409.00055, section 3;
    dL_reg/dP = 2/(F n) P E,  n = max(||E||_F, eps),  eps = 1e-5 sqrt(r)                 the published `calc_ortho`)

eps is the orthonormality that the initialisation promises. Without it the gradient at init is rounding noise at full
strength, which is what the published code adds.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from ..errors import NoAdaptedLayersError
from ..linalg.precision import full_precision

if TYPE_CHECKING:
    from ..layers.factors import SORSAFactors
    from ..layers.layer import SORSALayer


class Factor(NamedTuple):
    """One orthonormal factor P = initial + offset (rows x r) of one adapter, or a stack of them (E x rows x r)."""

    name: str
    initial: torch.Tensor
    offset: nn.Parameter

    @property
    def matrices(self) -> int:
        """How many factors P this is."""
        return self.offset.shape[0] if self.offset.ndim == 3 else 1


class Adapter(NamedTuple):
    """An adapter of one layer, by its name there."""

    layer: SORSALayer
    name: str
    tensors: SORSAFactors


def floor(rank: int) -> float:
    """eps = 1e-5 sqrt(r): the gap below which a factor counts as orthonormal."""
    return 1e-5 * rank**0.5


def trained_adapters(layers: Iterable[SORSALayer]) -> list[Adapter]:
    """Every active, trainable adapter, in the layers' order."""
    return [Adapter(layer, name, tensors) for layer in layers for name, tensors in layer.trained().items()]


def factors_of(adapters: Iterable[Adapter]) -> list[Factor]:
    """U and V of every adapter."""
    found = []
    for layer, adapter, tensors in adapters:
        # by the dictionaries: every optimizer step asks, and modules look attributes up slowly
        by_name: dict[str, Any] = {**tensors._buffers, **tensors._parameters}
        name = f"{layer.name}.{adapter}"
        found.append(Factor(f"{name}.U", by_name["U0"], by_name["dU"]))
        found.append(Factor(f"{name}.V", by_name["V0"], by_name["dV"]))
    return found


def trainable_factors(layers: Iterable[SORSALayer]) -> list[Factor]:
    """U and V of every active, trainable adapter, in the layers' order."""
    return factors_of(trained_adapters(layers))


def sorsa_layers(model: nn.Module) -> list[SORSALayer]:
    """The SORSA layers of a model, in module order."""
    from ..layers.layer import SORSALayer

    return [module for module in model.modules() if isinstance(module, SORSALayer)]


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

    Its gradient is the closed form above, smooth at orthonormal factors. Not for sharded parameters: there `attach`
    delivers the gradient.

    Raises:
        NoAdaptedLayersError: the model has no trained SORSA adapter.
    """
    factors = model_factors(model)
    found = [_Gap.apply(factor.initial + factor.offset).reshape(-1) for factor in factors]
    return torch.cat([gaps.to(found[0].device) for gaps in found]).mean()


class _Gap(torch.autograd.Function):
    @staticmethod
    @full_precision()
    def forward(ctx: Any, P: torch.Tensor) -> torch.Tensor:
        E = P.mT @ P
        E.diagonal(dim1=-2, dim2=-1).sub_(1.0)
        norm = torch.linalg.vector_norm(E, dim=(-2, -1))
        ctx.save_for_backward(P, E, norm)
        return norm

    @staticmethod
    @torch.autograd.function.once_differentiable
    @full_precision()
    def backward(ctx: Any, upstream: torch.Tensor) -> torch.Tensor:
        P, E, norm = ctx.saved_tensors
        return 2.0 * (P @ (E * (upstream / norm.clamp_min(floor(P.shape[-1])))[..., None, None]))
