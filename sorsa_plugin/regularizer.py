"""The orthonormal regularizer in closed form: gaps, loss and gradient of a set of factors; knows no optimizer.

    gap(P) = ||E||_F,  E = P^T P - I,    L_reg = mean of the gaps over all F factors    (arXiv 2409.00055, section 3;
    dL_reg/dP = 2/(F n) P E,  n = max(||E||_F, eps),  eps = 1e-5 sqrt(r)                 the published `calc_ortho`)

eps is the orthonormality that the initialisation promises. Without it the gradient at init is rounding noise at full
strength, which is what the published code adds.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from .errors import AttachError, NoAdaptedLayersError
from .precision import full_precision

if TYPE_CHECKING:
    from .layer import SORSALayer

BATCH_ELEMENTS = 2**23
"""Elements of the factors that are stacked and multiplied at a time: 32 MiB in fp32, twice that with what is added."""


class Factor(NamedTuple):
    """One orthonormal factor P = initial + offset (rows x r) of one adapter, or a stack of them (E x rows x r)."""

    name: str
    initial: torch.Tensor
    offset: nn.Parameter

    @property
    def matrices(self) -> int:
        """How many factors P this is."""
        return self.offset.shape[0] if self.offset.ndim == 3 else 1

    def names(self) -> list[str]:
        """The name of each of them."""
        return [self.name] if self.offset.ndim == 2 else [f"{self.name}[{i}]" for i in range(self.matrices)]


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


class Batch(NamedTuple):
    """Factors of one shape and what the regularizer needs of them, stacked: P (n x rows x r; the rows that this process
    holds) and E = P^T P - I (n x r x r). A stack of experts is n of them by itself."""

    factors: list[Factor]
    label: Any
    P: torch.Tensor
    E: torch.Tensor

    @property
    def rank(self) -> int:
        return self.E.shape[-1]

    def gaps(self) -> torch.Tensor:
        """||E||_F of every factor (n)."""
        return torch.linalg.vector_norm(self.E, dim=(1, 2))

    def add_product_to(self, targets: list[torch.Tensor | None]) -> None:
        """Add P E of every factor to its target (rows x r), where it has one."""
        present = [i for i, target in enumerate(targets) if target is not None]
        if present:
            products = (self.P @ self.E).chunk(len(targets))
            found: list[Any] = [local_part(target) for i in present if (target := targets[i]) is not None]
            torch._foreach_add_(found, [products[i].view_as(target) for i, target in zip(present, found, strict=True)])


@torch.no_grad()
def deviations(factors: list[Factor], labels: Sequence[Hashable] | None = None) -> Iterator[Batch]:
    """P and E of every factor, in batches of one shape, made as they are asked for.

    Where rows are sharded all batches are made at once, because one all-reduce serves them all.

    Args:
        factors: the factors.
        labels: one per factor; only factors with the same label share a batch.
    """
    made = (_batch(alike, label) for alike, label in _alike(factors, labels or [None] * len(factors)))
    sharded = any(hasattr(factor.offset, "placements") for factor in factors)
    for batch in _summed_over_shards(list(made)) if sharded else made:
        batch.E.diagonal(dim1=1, dim2=2).sub_(1.0)
        yield batch


def _alike(factors: list[Factor], labels: Sequence[Hashable]) -> Iterator[tuple[list[Factor], Hashable]]:
    """Groups of factors that can be stacked. Sharded ones go by their whole shape: every process groups alike."""
    alike: dict[Any, list[Factor]] = {}
    for factor, label in zip(factors, labels, strict=True):
        offset: Any = factor.offset
        sharding = getattr(offset, "device_mesh", None), getattr(offset, "placements", None)
        alike.setdefault((label, offset.shape, offset.dtype, offset.device, *sharding), []).append(factor)
    for (label, shape, *_), group in alike.items():
        size = max(1, BATCH_ELEMENTS // shape.numel())
        yield from ((group[start : start + size], label) for start in range(0, len(group), size))


@full_precision()
def _batch(factors: list[Factor], label: Hashable) -> Batch:
    """The Gram matrices of some factors' local rows, before I is subtracted; three launches for all of them."""
    initial = [local_part(factor.initial) for factor in factors]
    P = torch.stack(torch._foreach_add(initial, [local_part(factor.offset) for factor in factors])).flatten(0, -3)
    return Batch(factors, label, P, P.mT @ P)


@torch.no_grad()
def gaps(model: nn.Module) -> dict[str, float]:
    """gap(P) of every trained factor by name (`<layer>.<adapter>.U` or `.V`, and `[i]` in a stack of experts)."""
    return gaps_by_name(model_factors(model))


def gaps_by_name(factors: list[Factor]) -> dict[str, float]:
    """gap(P) of some factors, in their order."""
    found: dict[str, float] = {}
    for batch in deviations(factors):
        names = [name for factor in batch.factors for name in factor.names()]
        found.update(zip(names, batch.gaps().tolist(), strict=True))
    return {name: found[name] for factor in factors for name in factor.names()}


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
        norm = torch.linalg.vector_norm(E, dim=(-2, -1))
        ctx.save_for_backward(P, E, norm)
        return norm

    @staticmethod
    @torch.autograd.function.once_differentiable
    @full_precision()
    def backward(ctx: Any, upstream: torch.Tensor) -> torch.Tensor:
        P, E, norm = ctx.saved_tensors
        return 2.0 * (P @ (E * (upstream / norm.clamp_min(floor(P.shape[-1])))[..., None, None]))


def _summed_over_shards(batches: list[Batch]) -> list[Batch]:
    """Add up the Gram matrices of row-sharded DTensors over their shards, in place, one all-reduce per mesh."""
    sharded: dict[Any, list[torch.Tensor]] = {}
    for batch in batches:
        offset: Any = batch.factors[0].offset
        placements = getattr(offset, "placements", ())
        if any(p.is_shard() and (not p.is_shard(0) or offset.ndim == 3) for p in placements):
            raise AttachError(
                f"{batch.factors[0].name} of shape {tuple(offset.shape)} is sharded as {placements}; expected row "
                "shards (FSDP2's Shard(0)) of a matrix. Tensor-parallel plans over SORSA factors, and sharded stacks "
                "of experts, are not supported: keep them out of the plan, or train them with DDP."
            )
        dims = tuple(i for i, p in enumerate(placements) if p.is_shard(0))
        if dims:
            sharded.setdefault((offset.device_mesh, dims), []).append(batch.E)
    for (mesh, dims), parts in sharded.items():
        flat = torch.cat([part.reshape(-1) for part in parts])
        for dim in dims:
            torch.distributed.all_reduce(flat, group=mesh.get_group(dim))
        for part, total in zip(parts, flat.split([part.numel() for part in parts]), strict=True):
            part.copy_(total.view_as(part))
    return batches
