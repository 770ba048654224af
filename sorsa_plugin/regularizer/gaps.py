"""P and E = P^T P - I of many factors at once, from the part that each process holds; knows no optimizer or engine.

If rows are spread over processes, one all-reduce of r x r matrices serves all factors, and no factor is gathered. If
engines cut in the middle of a row, another small all-reduce completes those rows first.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import nn

from ..linalg.orthonormality import minus_identity
from ..linalg.precision import full_precision
from .engines import BATCH_ELEMENTS, Share, find_engine
from .trained_factors import model_factors


class Batch(NamedTuple):
    """Factors of which this process has shares of one shape and place, and what the regularizer needs of them.

    Attributes:
        shares: the shares, of n factors.
        numbers: their positions in the list that `deviations` was given.
        P: the rows that the shares are a part of, complete (n x rows x r).
        head: number of elements of the first of these rows that belong to the process before.
        E: P^T P - I of the whole factors (n x r x r).
    """

    shares: list[Share]
    numbers: list[int]
    P: torch.Tensor
    head: int
    E: torch.Tensor

    @property
    def rank(self) -> int:
        """r."""
        return self.E.shape[-1]

    def gaps(self) -> torch.Tensor:
        """||E||_F of every factor (n)."""
        return torch.linalg.vector_norm(self.E, dim=(1, 2))

    def add_product_to(self, targets: list[torch.Tensor | None]) -> None:
        """Add P E of every factor to its target (shape of the share's `offset`); None skips a factor."""
        present = [i for i, target in enumerate(targets) if target is not None]
        if not present or not self.P.numel():
            return
        found: list[Any] = [targets[i] for i in present]
        products, shape = self.P @ self.E, found[0].shape
        if found[0].ndim == 1:  # single elements, whose first row may begin in another process
            products = products.flatten(1)[:, self.head : self.head + shape.numel()]
        products = products.to(found[0].device)
        parts = products.split(shape[0]) if found[0].ndim == 3 else products.unbind()
        torch._foreach_add_(found, [parts[i] for i in present])


@torch.no_grad()
def deviations(shares: list[Share]) -> Iterator[Batch]:
    """P and E of every factor, lazily, in batches of one parameter group.

    If factors are spread over processes, all batches are computed at once, and every process has to ask for all of
    them. The caller sets the precision (`full_precision`).
    """
    spread = any(share.spread for share in shares)
    made = (_batch(numbers, [shares[i] for i in numbers]) for numbers in _alike(shares))
    for batch in _over_processes(shares, list(made)) if spread else made:
        yield batch._replace(E=minus_identity(batch.E if spread else _gram(batch)))


def _alike(shares: list[Share]) -> Iterator[list[int]]:
    """Lists of the numbers of shares that can be stacked."""
    alike: dict[Any, list[int]] = {}
    for number, share in enumerate(shares):
        offset = share.offset
        place = share.rank, share.start, share.cuts, share.spread
        alike.setdefault((offset.shape, offset.dtype, offset.device, id(share.group), *place), []).append(number)
    for (shape, *_), group in alike.items():
        size = max(1, BATCH_ELEMENTS // max(1, shape.numel()))
        yield from (group[start : start + size] for start in range(0, len(group), size))


def _batch(numbers: list[int], shares: list[Share]) -> Batch:
    """The values of some shares as rows, with zeros for elements of other processes. E is set later."""
    join = torch.cat if shares[0].offset.ndim == 3 else torch.stack
    P = join([share.initial for share in shares])
    P.add_(join([share.offset for share in shares]).to(P.device))
    rank, head = shares[0].rank, 0
    if P.dim() == 2:
        head = shares[0].start % rank if P.shape[1] else 0
        rows = -(-(head + P.shape[1]) // rank)
        P = torch.nn.functional.pad(P, (head, rows * rank - head - P.shape[1])).view(len(shares), rows, rank)
    return Batch(shares, numbers, P, head, P.new_empty(0))


def _gram(batch: Batch) -> torch.Tensor:
    """Sum of p^T p over the rows p that begin in this process (n x r x r)."""
    own = batch.P[:, 1:] if batch.head else batch.P
    return own.mT @ own


def _over_processes(shares: list[Share], batches: list[Batch]) -> list[Batch]:
    """Complete the cut rows and add up the Gram matrices, each with one all-reduce per set of process groups."""
    rows = _Exchange(shares, batches, [(len(share.cuts), share.rank) for share in shares])
    cut = [(batch, *_cut_rows(batch)) for batch in batches]
    for batch, here, place in cut:
        if here:
            torch._foreach_copy_([rows.part(i)[place] for i in batch.numbers], list(batch.P[:, here].unbind()))
    rows.sum()
    for batch, here, place in cut:
        if here:
            batch.P[:, here] = torch.stack([rows.part(i)[place] for i in batch.numbers])
    grams = _Exchange(shares, batches, [(share.rank, share.rank) for share in shares])
    for batch in batches:
        torch._foreach_copy_([grams.part(i) for i in batch.numbers], list(_gram(batch).unbind()))
    grams.sum()
    return [batch._replace(E=torch.stack([grams.part(i) for i in batch.numbers])) for batch in batches]


def _cut_rows(batch: Batch) -> tuple[list[int], slice]:
    """Which rows of P are cut, and their places in the list of all cut rows of these factors."""
    first, rows = batch.shares[0].start // batch.P.shape[2], batch.P.shape[1]
    here = [(row - first, i) for i, row in enumerate(batch.shares[0].cuts) if first <= row < first + rows]
    places = [place for _, place in here]
    return [row for row, _ in here], slice(places[0], places[-1] + 1) if places else slice(0)


class _Exchange:
    """One matrix per factor, added up over the processes of its `spread`.

    It follows the order of the shares, which is the same on every process, and not how this process could stack them.
    """

    def __init__(self, shares: list[Share], batches: list[Batch], shapes: list[tuple[int, int]]) -> None:
        members: dict[Any, list[int]] = {}
        for number, share in enumerate(shares):
            members.setdefault(share.spread, []).append(number)
        like = {number: batch.P for batch in batches for number in batch.numbers}
        self.flat: dict[Any, torch.Tensor] = {}
        self.parts: dict[int, torch.Tensor] = {}
        for spread, numbers in members.items():
            sizes = [shapes[i][0] * shapes[i][1] for i in numbers]
            self.flat[spread] = like[numbers[0]].new_zeros(sum(sizes))
            for number, part in zip(numbers, self.flat[spread].split(sizes), strict=True):
                self.parts[number] = part.view(shapes[number])

    def part(self, number: int) -> torch.Tensor:
        """The matrix of a factor, a view."""
        return self.parts[number]

    def sum(self) -> None:
        for spread, flat in self.flat.items():
            for group in spread if flat.numel() else ():
                torch.distributed.all_reduce(flat, group=group)


@torch.no_grad()
def gaps(model: nn.Module) -> dict[str, float]:
    """gap(P) of every trained factor, {name: gap}; a collective if the factors are sharded.

    Names are `<layer>.<adapter>.U` or `.V`, with `[i]` in a stack.

    Raises:
        NoAdaptedLayersError: the model has no trained SORSA adapter.
        AttachError: no plug-in knows how the factors are stored.
    """
    factors = model_factors(model)
    shares = find_engine(factors, None).shares(factors)
    names = [name for share in shares for name in share.names()]
    return dict(zip(names, all_gaps(shares).tolist(), strict=True))


@full_precision()
@torch.no_grad()
def all_gaps(shares: Iterable[Share]) -> torch.Tensor:
    """gap(P) of all factors of the shares (n), in their order, on one device."""
    found: dict[int, torch.Tensor] = {}
    for batch in deviations(list(shares)):
        found |= zip(batch.numbers, batch.gaps().split(batch.shares[0].matrices), strict=True)
    device = next(iter(found.values())).device
    return torch.cat([found[number].to(device) for number in sorted(found)])
