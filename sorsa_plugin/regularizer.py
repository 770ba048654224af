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

from .errors import AttachError, NoAdaptedLayersError
from .precision import full_precision

if TYPE_CHECKING:
    from .layer import SORSALayer


class Factor(NamedTuple):
    """One orthonormal factor P = initial + offset (rows x r) of one adapter, or a stack of them (E x rows x r)."""

    name: str
    initial: torch.Tensor
    offset: nn.Parameter

    @property
    def matrices(self) -> int:
        """How many factors P this is."""
        return self.offset.shape[0] if self.offset.ndim == 3 else 1

    def local(self) -> torch.Tensor:
        """P, or the rows of it that this process holds, without gradient."""
        with torch.no_grad():
            return local_part(self.initial) + local_part(self.offset)


def local_part(tensor: torch.Tensor) -> torch.Tensor:
    """The rows of a DTensor that this process holds (a view); any other tensor as it is."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def floor(rank: int) -> float:
    """eps = 1e-5 sqrt(r): the gap below which a factor counts as orthonormal."""
    return 1e-5 * rank**0.5


def trainable_factors(layers: Iterable[SORSALayer]) -> list[Factor]:
    """U and V of every active, trainable adapter, in the layers' order."""
    found = []
    for layer in layers:
        for adapter in layer.trainable_adapters():
            tensors = layer.factors(adapter)
            found.append(Factor(f"{layer.name}.{adapter}.U", tensors.U0, tensors.dU))
            found.append(Factor(f"{layer.name}.{adapter}.V", tensors.V0, tensors.dV))
    return found


def sorsa_layers(model: nn.Module) -> list[SORSALayer]:
    """The SORSA layers of a model, in module order."""
    from .layer import SORSALayer

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


@full_precision()
@torch.no_grad()
def deviations(factors: list[Factor], values: list[torch.Tensor] | None = None) -> list[torch.Tensor]:
    """E = P^T P - I (r x r, plain tensors) of every factor; one all-reduce for all of them where rows are sharded.

    A stack of factors gives a stack (E x r x r).

    Args:
        factors: the factors.
        values: their `local()` values, if already at hand.
    """
    values = [factor.local() for factor in factors] if values is None else values
    grams = [P.mT @ P for P in values]
    _sum_over_shards(factors, grams)
    for gram in grams:
        gram.diagonal(dim1=-2, dim2=-1).sub_(1.0)
    return grams


def norms(E: torch.Tensor) -> torch.Tensor:
    """||E||_F of one deviation (a scalar), or of each of a stack."""
    return E.flatten(-2).norm(dim=-1)


def add_product(target: torch.Tensor, P: torch.Tensor, E: torch.Tensor, alpha: float = 1.0) -> None:
    """target += alpha P E, in place, for one factor or a stack."""
    (target.addmm_ if P.ndim == 2 else target.baddbmm_)(P, E, alpha=alpha)


@torch.no_grad()
def gaps(model: nn.Module) -> dict[str, float]:
    """gap(P) of every trained factor by name (`<layer>.<adapter>.U` or `.V`, and `[i]` in a stack)."""
    factors = model_factors(model)
    names = [
        name
        for factor in factors
        for name in (
            [factor.name] if factor.offset.ndim == 2 else [f"{factor.name}[{i}]" for i in range(factor.matrices)]
        )
    ]
    return dict(zip(names, all_gaps(deviations(factors)).tolist(), strict=True))


def all_gaps(deviations: list[torch.Tensor]) -> torch.Tensor:
    """The gaps of all factors (F), those of stacks one after the other."""
    return torch.cat([norms(E).reshape(-1) for E in deviations])


def orthonormality(model: nn.Module) -> torch.Tensor:
    """L_reg of a model: the mean gap over its F trained factors, a scalar differentiable with respect to the offsets.

    Its gradient is the closed form above, smooth at orthonormal factors. Not for sharded parameters: there `attach`
    delivers the gradient.

    Raises:
        NoAdaptedLayersError: the model has no trained SORSA adapter.
    """
    factors = model_factors(model)
    return torch.cat([_Gap.apply(factor.initial + factor.offset).reshape(-1) for factor in factors]).mean()


class _Gap(torch.autograd.Function):
    @staticmethod
    @full_precision()
    def forward(ctx: Any, P: torch.Tensor) -> torch.Tensor:
        E = P.mT @ P
        E.diagonal(dim1=-2, dim2=-1).sub_(1.0)
        norm = norms(E)
        ctx.save_for_backward(P, E, norm)
        return norm

    @staticmethod
    @torch.autograd.function.once_differentiable
    @full_precision()
    def backward(ctx: Any, upstream: torch.Tensor) -> torch.Tensor:
        P, E, norm = ctx.saved_tensors
        return 2.0 * (P @ (E * (upstream / norm.clamp_min(floor(P.shape[-1])))[..., None, None]))


def _sum_over_shards(factors: list[Factor], grams: list[torch.Tensor]) -> None:
    """Add up the Gram matrices of row-sharded DTensors over their shards, in place, one all-reduce per mesh."""
    sharded: dict[Any, list[torch.Tensor]] = {}
    for factor, gram in zip(factors, grams, strict=True):
        offset: Any = factor.offset
        placements = getattr(offset, "placements", ())
        if any(p.is_shard() and (not p.is_shard(0) or factor.offset.ndim == 3) for p in placements):
            raise AttachError(
                f"{factor.name} of shape {tuple(offset.shape)} is sharded as {placements}; expected row shards "
                "(FSDP2's Shard(0)) of a matrix. Tensor-parallel plans over SORSA factors, and sharded stacks of "
                "experts, are not supported: keep them out of the plan, or train them with DDP."
            )
        dims = tuple(i for i, p in enumerate(placements) if p.is_shard(0))
        if dims:
            sharded.setdefault((offset.device_mesh, dims), []).append(gram)
    for (mesh, dims), parts in sharded.items():
        flat = torch.cat([part.reshape(-1) for part in parts])
        for dim in dims:
            torch.distributed.all_reduce(flat, group=mesh.get_group(dim))
        for part, total in zip(parts, flat.split([part.numel() for part in parts]), strict=True):
            part.copy_(total.view_as(part))
