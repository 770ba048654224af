"""W -> (U0, S0, V0): the top singular triplets of one matrix; knows no layer, adapter or model.

The factors are fp32, deterministic for a seed, and sign-fixed (the entry of largest magnitude in each column of U is
positive), so that another backend or thread count gives the same factors up to rounding. The global random state is
never read or written.
"""

from __future__ import annotations

import logging
from typing import NamedTuple

import torch

from .errors import DecompositionError, RankError, SORSAConfigError
from .precision import full_precision

logger = logging.getLogger(__name__)

EXACT_LIMIT = 256
"""`svd="auto"` is exact where the smaller side is at most this: there LAPACK is about as fast as the sketch."""

METHODS = ("auto", "exact", "randomized")

OVERSAMPLE = 16
POWER_ITERATIONS = 8
"""Subspace iterations of the randomized path, each with a re-orthonormalisation (Halko et al., 2011, alg. 4.4)."""


class Triplets(NamedTuple):
    """Top-r singular triplets: U (out x r), S (r, descending), V (in x r), all fp32 on the CPU or the accelerator."""

    U: torch.Tensor
    S: torch.Tensor
    V: torch.Tensor


@full_precision()
def factorise(weight: torch.Tensor, rank: int, *, svd: str = "auto", seed: int = 0, name: str = "weight") -> Triplets:
    """Top singular triplets of a matrix.

    Args:
        weight: matrix (out x in) of any floating dtype, on any device but meta; worked on as one fp32 copy, on the
            process's accelerator if there is one.
        rank: number of triplets r, 1 <= r <= min(out, in).
        svd: "exact", "randomized", or "auto" (exact where the smaller side is at most 256 or 2 r).
        seed: seed of the randomized path.
        name: the layer's name, for messages.

    Returns:
        Triplets on the device of `weight`.

    Raises:
        RankError: the rank is below 1 or larger than min(out, in).
        SORSAConfigError: svd is none of these.
        DecompositionError: the weight holds NaN or infinity, or neither the device nor the CPU converged.
    """
    if svd not in METHODS:
        raise SORSAConfigError(f"svd is {svd!r}; expected one of {', '.join(map(repr, METHODS))}.")
    if rank < 1:
        raise RankError(f"The rank of {name} is {rank}; expected an integer >= 1.")
    smaller = min(weight.shape)
    if rank > smaller:
        raise RankError(
            f"The rank of {name} is {rank}, but its weight of shape {tuple(weight.shape)} has only {smaller} singular "
            f"triplets. Lower r to at most {smaller}, give it an entry in rank_pattern, or exclude the module."
        )
    home = weight.device
    matrix = weight.detach().to(device=working_device(home), dtype=torch.float32)
    if not torch.isfinite(matrix).all():
        raise DecompositionError(
            f"The weight of {name} holds NaN or infinity, so it has no singular value decomposition. Check the base "
            "model's checkpoint, or exclude the module."
        )
    exact = svd == "exact" or (svd == "auto" and (smaller <= EXACT_LIMIT or 2 * rank >= smaller))
    try:
        triplets = _exact(matrix, rank) if exact else _randomized(matrix, rank, seed)
    except torch.linalg.LinAlgError as error:
        triplets = _on_cpu(matrix, rank, name, error)
    return Triplets(*(part.to(home) for part in _fix_signs(triplets)))


@full_precision()
def captured_energy(weight: torch.Tensor, triplets: Triplets) -> float:
    """Share of ||W||_F^2 (0 to 1) that the triplets span: sum diag(U^T W V)^2 / ||W||_F^2."""
    matrix = weight.detach().to(triplets.U)
    diagonal = ((matrix @ triplets.V) * triplets.U).sum(0)
    return float(diagonal.square().sum() / matrix.square().sum())


def working_device(home: torch.device) -> torch.device:
    """The process's accelerator if there is one, wherever the weight lives; else the weight's own device."""
    if home.type == "cpu" and torch.accelerator.is_available():
        accelerator = torch.accelerator.current_accelerator()
        if accelerator is not None and accelerator.type != "mps":  # MPS runs its SVD on the CPU
            return accelerator
    return home


def _exact(matrix: torch.Tensor, rank: int) -> Triplets:
    U, S, Vh = torch.linalg.svd(matrix, full_matrices=False)
    return Triplets(U[:, :rank], S[:rank], Vh[:rank].mT)


def _randomized(matrix: torch.Tensor, rank: int, seed: int) -> Triplets:
    width = min(rank + OVERSAMPLE, *matrix.shape)
    # drawn on the CPU: the same numbers whatever device factorises
    generator = torch.Generator().manual_seed(seed)
    sketch = torch.randn(matrix.shape[1], width, generator=generator).to(matrix)
    Q, _ = torch.linalg.qr(matrix @ sketch)
    for _ in range(POWER_ITERATIONS):
        Z, _ = torch.linalg.qr(matrix.mT @ Q)
        Q, _ = torch.linalg.qr(matrix @ Z)
    inner_U, S, Vh = torch.linalg.svd(Q.mT @ matrix, full_matrices=False)
    return Triplets((Q @ inner_U)[:, :rank], S[:rank], Vh[:rank].mT)


def _on_cpu(matrix: torch.Tensor, rank: int, name: str, error: Exception) -> Triplets:
    logger.warning("The decomposition of %s did not converge on %s (%s); trying LAPACK on the CPU in float64.",
                   name, matrix.device, error)  # fmt: skip
    try:
        triplets = _exact(matrix.cpu().double(), rank)
    except torch.linalg.LinAlgError as second:
        raise DecompositionError(
            f"The decomposition of {name} converged neither on {matrix.device} nor on the CPU ({second}). Exclude the "
            "module, or choose the other `svd` method."
        ) from second
    return Triplets(*(part.float() for part in triplets))


def _fix_signs(triplets: Triplets) -> Triplets:
    U, S, V = triplets
    peak = U.abs().argmax(0, keepdim=True)
    sign = torch.where(U.gather(0, peak) < 0, -1.0, 1.0).to(U.dtype)
    return Triplets((U * sign).contiguous(), S.contiguous(), (V * sign).contiguous())
