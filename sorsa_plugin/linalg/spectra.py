"""What the paper measures about one weight: how far training moved its singular values and vectors; knows no model.

    dSigma = mean |s_t - s_0|,    dD = 1 - mean(|<u_t, u_0>| + |<v_t, v_0>|) / 2        (arXiv 2409.00055)

Both go column by column, in descending order of the singular values. Two things about singular vectors are arbitrary
and must not count as change:

- **Signs.** (u, v) and (-u, -v) are the same triplet. The absolute values take care of that.
- **Bases of degenerate triplets.** Where singular values are equal, any rotation of their vectors is another
  decomposition of the same weight. Neighbours closer than `DEGENERATE` times the largest singular value, in either
  weight, are compared as the subspaces that they span: the sum of |<u_t, u_0>| becomes the sum of the cosines of the
  principal angles, the nuclear norm of U_t^T U_0. That is the largest value that any choice of bases gives. It does not
  depend on the choice, and is |<u_t, u_0>| for a single column.

Triplets whose order training has exchanged count as changed, as in the paper: pairing them by similarity would hide
that they were mixed. A larger `degenerate` compares whole neighbourhoods as subspaces instead.
"""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import torch

from ..errors import DecompositionError, RankError
from .svd import working_device

DEGENERATE = 1e-6
"""Relative to the largest singular value: the difference that a decomposition in fp32 cannot resolve."""

GRAM_LIMIT = 1e-6
"""W^T W loses singular values below this share of the largest: its rounding is 1e-16 of the largest squared."""


class Spectrum(NamedTuple):
    """Singular triplets of one matrix in float64: all n = min(out, in) values, and the vectors of the first k."""

    U: torch.Tensor
    """(out x k)"""
    S: torch.Tensor
    """(n), descending"""
    V: torch.Tensor
    """(in x k)"""


@torch.no_grad()
def decompose(weight: torch.Tensor, top: int | None = None, name: str = "weight") -> Spectrum:
    """The singular triplets of a matrix (out x in), in float64, computed on the accelerator if there is one.

    Args:
        weight: matrix (out x in) of any floating dtype.
        top: compute the vectors of this many triplets only; None for all. Uses the eigenvectors of the smaller Gram
            matrix, in half the time of a full decomposition. Just as exact, because the full decomposition is used if a
            singular value is below 1e-6 of the largest.
        name: for messages.

    Raises:
        RankError: top is below 1.
        DecompositionError: the weight holds NaN or infinity.
    """
    if top is not None and top < 1:
        raise RankError(f"top is {top}; expected an integer >= 1, or None for all triplets.")
    matrix = weight.detach().to(working_device(weight.device)).double()
    if not matrix.isfinite().all():
        raise DecompositionError(
            f"{name} holds NaN or infinity, so it has no singular values. The training run diverged or the file was "
            "damaged: analyse an earlier checkpoint."
        )
    count = min(matrix.shape)
    if top is not None and top < count:
        spectrum = _by_gram(matrix, top)
        if spectrum is not None:
            return spectrum
    U, S, Vh = torch.linalg.svd(matrix, full_matrices=False)
    kept = min(top or count, count)
    return Spectrum(U[:, :kept], S, Vh[:kept].mT)


def _by_gram(matrix: torch.Tensor, top: int) -> Spectrum | None:
    if matrix.shape[0] < matrix.shape[1]:
        flipped = _by_gram(matrix.mT, top)
        return None if flipped is None else Spectrum(flipped.V, flipped.S, flipped.U)
    values, vectors = torch.linalg.eigh(matrix.mT @ matrix)
    S = values.flip(0).clamp_min(0).sqrt()
    if S[-1] <= GRAM_LIMIT * S[0]:
        return None
    V = vectors.flip(1)[:, :top]
    return Spectrum((matrix @ V) / S[:top], S, V)


def delta_sigma(before: Spectrum, after: Spectrum) -> float:
    """The paper's dSigma = mean |s_t - s_0| over the first k triplets, those whose vectors `before` has."""
    count = before.U.shape[1]
    return float((after.S[:count] - before.S[:count]).abs().mean())


def delta_direction(before: Spectrum, after: Spectrum, degenerate: float = DEGENERATE) -> float:
    """The paper's dD, between 0 (the same vectors) and 1 (all orthogonal to what they were).

    Args:
        before, after: spectra of the pre-trained and the merged weight, of equal shapes.
        degenerate: neighbours whose gap, relative to the largest singular value before, is at most this are compared as
            subspaces. A group that `top` cuts in two is left out.
    """
    count = before.U.shape[1]
    runs = degenerate_runs(before, after, degenerate)
    whole = [run for run in runs if run.stop <= count] or [slice(0, count)]
    overlap = sum(_overlap(before.U, after.U, run) + _overlap(before.V, after.V, run) for run in whole)
    compared = sum(run.stop - run.start for run in whole)
    return max(0.0, 1 - overlap / (2 * compared))


def degenerate_runs(before: Spectrum, after: Spectrum, degenerate: float = DEGENERATE) -> list[slice]:
    """The first k columns, cut between neighbours whose singular values differ both before and after.

    The last run may reach beyond k.
    """
    tolerance = degenerate * float(before.S[0])
    differ = ((-before.S.diff() > tolerance) & (-after.S.diff() > tolerance)).tolist()
    cuts = [index + 1 for index, cut in enumerate(differ) if cut]
    edges = [0, *cuts, len(before.S)]
    return [slice(a, b) for a, b in pairwise(edges) if a < before.U.shape[1]]


def _overlap(before: torch.Tensor, after: torch.Tensor, run: slice) -> float:
    a, b = before[:, run], after[:, run]
    if a.shape[1] == 1:
        return float((a * b).sum().abs())
    return float(torch.linalg.svdvals(a.mT @ b).sum())


def condition_number(S: torch.Tensor) -> float:
    """s_1 / s_n of singular values S (n) in descending order; infinite if s_n is no more than rounding."""
    rounding = len(S) * torch.finfo(torch.float64).eps * S[0]
    return float(S[0] / S[-1]) if S[-1] > rounding else float("inf")


@torch.no_grad()
def product_condition(P: torch.Tensor, Q: torch.Tensor) -> float | None:
    """Condition number of P Q^T on its rank r, for P (out x r) and Q (in x r).

    None if the rank is lower, or the product is not finite.
    """
    _, R1 = torch.linalg.qr(P.double())
    _, R2 = torch.linalg.qr(Q.double())
    core = R1 @ R2.mT
    if not core.isfinite().all():
        return None
    condition = condition_number(torch.linalg.svdvals(core))
    return condition if condition != float("inf") else None
