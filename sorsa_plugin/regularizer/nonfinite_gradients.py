"""Names the origin of a gradient that holds NaN or infinity, before it spreads into every factor of every process.

The gradients that an optimizer steps have been reduced and clipped, so one bad number has reached all factors of all
processes. To find its origin, each process keeps one number per layer of its own gradients: the sum of dL/ddS. As
dL/ddS = diag(U^T (dL/dy)^T x V), that sum is finite only if the layer's input and the gradient of its output are.

No step waits for a GPU: the norms of a step are read when the next one begins. On other devices they are read at once.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from contextlib import suppress
from datetime import timedelta
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import distributed
from torch.optim.optimizer import Optimizer

from ..errors import NonFiniteGradientError
from ..files.adapter_format import OFFSETS
from ..rank_zero import say

if TYPE_CHECKING:
    from .trained_factors import Adapter

LOST = "is taken, and the factors are lost"

DIVERGED = 100.0
"""A gap ||P^T P - I|| above this is divergence, and not a batch: columns ten times as long as orthonormal ones."""

PATIENCE = timedelta(seconds=10)
"""How long a process that found a bad gradient waits for the other processes' reports on their own."""


class Norms(NamedTuple):
    """The gradient norms of some tensors at one optimizer step, on their way to the host.

    Attributes:
        step: number of the step, from 1.
        tensors: the parameters that the optimizer steps (n).
        values: their gradients' norms (n), in host memory once `arrived` has happened.
        arrived: an event of the GPU, or None if the values were on the host from the start.
        found: what the step knows of the adapters.
    """

    step: int
    tensors: list[torch.Tensor]
    values: torch.Tensor
    arrived: Any
    found: Found


class Found(NamedTuple):
    """What an optimizer step knows of the adapters, to explain a bad gradient.

    Attributes:
        adapters: those that train.
        own: {layer: sum of this process's own gradient of dS}, scalars on the device; see `own_gradients`.
        gaps: the gaps that were measured last, tensors on the device; empty if gamma is 0.
    """

    adapters: list[Adapter]
    own: dict[str, torch.Tensor]
    gaps: list[torch.Tensor]

    def name_of(self, tensor: torch.Tensor) -> str:
        """`<layer>.<adapter>.U`, `.S` or `.V`, or the shape of a tensor that is no adapter's own."""
        for layer, adapter, tensors in self.adapters:
            for name in OFFSETS:
                if tensors._parameters[name] is tensor:
                    return f"{layer.name}.{adapter}.{name[1:]}"
        return f"a tensor of shape {tuple(tensor.shape)} beside the adapters"


class GradientWatch:
    """Notices the first optimizer step whose gradients are not finite; on a GPU, when the next step begins.

    Attributes:
        stops: whether it raises: True if somebody called `attach`. A loop that did not gets a log line instead.
        over: whether that line was logged; nothing is checked afterwards.
    """

    def __init__(self) -> None:
        self.stops = False
        self.over = False
        self._pending: list[Norms] = []

    @torch.no_grad()
    def note(self, step: int, optimizer: Optimizer, found: Found) -> None:
        """Check that the last step's gradients were finite, then look at those of the step that begins now.

        Everything that the optimizer steps is looked at: clipping divides by the norm of all of it.

        Args:
            step: number of the step, from 1.
            optimizer: the torch optimizer that steps.
            found: what the step knows of the adapters.

        Raises:
            NonFiniteGradientError: the gradients of the last step, or those of this one if they are on the host, are
                not finite.
        """
        self.settle()
        if self.over:
            return
        by_device: dict[torch.device, list[tuple[torch.Tensor, torch.Tensor]]] = {}
        for tensor in (tensor for group in optimizer.param_groups for tensor in group["params"]):
            if tensor.grad is not None and (gradient := _values(tensor.grad)).numel():
                by_device.setdefault(gradient.device, []).append((tensor, gradient))
        for device, pairs in by_device.items():
            values = torch.stack([norm.float() for norm in torch._foreach_norm([gradient for _, gradient in pairs])])
            arrived = None
            if device.type == "cuda":
                host = torch.empty(values.shape, device="cpu", dtype=values.dtype, pin_memory=True)
                values = host.copy_(values, non_blocking=True)
                arrived = torch.cuda.Event()
                arrived.record(torch.cuda.current_stream(device))
            self._pending.append(Norms(step, [tensor for tensor, _ in pairs], values, arrived, found))
        if all(norms.arrived is None for norms in self._pending):
            self.settle()

    def settle(self) -> None:
        """Read the norms that were noted.

        Raises:
            NonFiniteGradientError: a norm is not finite, and `stops` is set.
        """
        pending, self._pending = self._pending, []
        for norms in pending:
            if norms.arrived is not None:
                norms.arrived.synchronize()
            if self.over or torch.isfinite(norms.values).all():
                continue
            if self.stops:
                raise NonFiniteGradientError(_explain(norms, "was not taken" if norms.arrived is None else LOST))
            self.over = True
            say("%s", _explain(norms, LOST))


def own_gradients(adapters: Iterable[Adapter]) -> dict[str, torch.Tensor]:
    """{layer: sum of dL/ddS from this process's backward passes since the last call}, scalars.

    Layers that kept no sum are left out.
    """
    found = {}
    for layer, _, tensors in adapters:
        total = tensors.take_gradient_sum()
        if total is not None:
            found[layer.name] = total
    return found


def origin(own: dict[str, torch.Tensor], occasion: str) -> str:
    """A sentence on which processes had a bad gradient of their own, and in which layers.

    Args:
        own: {layer: scalar} that `own_gradients` found here.
        occasion: a word for this call, the same on all processes, and another one each time.
    """
    bad = [name for name, total in own.items() if not _finite(float(total))]
    origins = [
        f"rank {rank} in {len(layers)} of {len(own)} layers, the last of them {layers[-1]}"
        for rank, layers in sorted(_everywhere(occasion, bad).items())
        if layers
    ]
    if origins:
        return f"Before reduction and clipping it was not finite on {'; on '.join(origins)}: look at that batch."
    if own:
        return "Before reduction and clipping it was finite wherever that could be asked: it overflowed later."
    return "The layers kept no gradients of their own (compiled models keep none): look at the batches."


def _values(gradient: Any) -> Any:
    """The numbers of a gradient that lie in this process, as a plain tensor."""
    if gradient.is_sparse:
        return gradient._values()
    return gradient.to_local() if hasattr(gradient, "to_local") else gradient


def _explain(norms: Norms, outcome: str) -> str:
    bad = [tensor for tensor, value in zip(norms.tensors, norms.values.tolist(), strict=True) if not _finite(value)]
    return (
        f"The gradient of {len(bad)} of {len(norms.tensors)} trained tensors is not finite in optimizer step "
        f"{norms.step}, the first of them {norms.found.name_of(bad[0])}; the step {outcome}. {_cause(norms)}"
    )


def _cause(norms: Norms) -> str:
    """Where it came from and what to do: a batch is named only where the factors had not diverged before."""
    found = [float(gaps.max()) for gaps in norms.found.gaps if gaps.numel()]
    largest = max(found, key=lambda gap: gap if _finite(gap) else float("inf"), default=0.0)
    if largest > DIVERGED or not _finite(largest):
        return (
            f"The factors had diverged: their largest gap was {largest:g}, and that of orthonormal factors is 0. Lower "
            "the learning rate or gamma, and resume from a checkpoint of a step at which sorsa/gap_max was below 1."
        )
    return (
        f"{origin(norms.found.own, f'step {norms.step}')} Then lower the learning rate or leave the batch out, and "
        "resume from last_complete_checkpoint(output_dir)."
    )


def _finite(value: float) -> bool:
    return value - value == 0.0


def _everywhere(occasion: str, own: list[str]) -> dict[int, list[str]]:
    """{rank: layers} of all processes that found the same.

    Not a collective, because other processes may have found nothing.
    """
    if not (distributed.is_available() and distributed.is_initialized()):
        return {0: own}
    rank = distributed.get_rank()
    found = {rank: own}
    store = distributed.distributed_c10d._get_default_store()
    keys = {other: f"sorsa/{occasion}/{other}" for other in range(distributed.get_world_size())}
    store.set(keys[rank], json.dumps(own))
    with suppress(RuntimeError):  # torch's DistStoreError: time is up
        store.wait(list(keys.values()), PATIENCE)
    for other, key in keys.items():
        if other != rank and store.check([key]):
            found[other] = json.loads(store.get(key))
    return found
