"""W -> (U0, S0, V0): the top singular triplets of one matrix; knows no layer, adapter or model.

The factors are fp32, deterministic for a seed, and sign-fixed (the entry of largest magnitude in each column of U is
positive), so that another backend or thread count gives the same factors up to rounding. The global random state is
never read or written.
"""

from __future__ import annotations

import logging
from typing import Literal, NamedTuple, get_args

import torch

from ..errors import DecompositionError, RankError, SORSAConfigError
from .orthonormality import floor, gram_minus_identity
from .precision import full_precision

logger = logging.getLogger(__name__)

EXACT_LIMIT = 256
"""`svd="auto"` is exact where the smaller side is at most this: there LAPACK is about as fast as the sketch."""

SvdMethod = Literal["auto", "exact", "randomized"]
METHODS = get_args(SvdMethod)

DEFAULT_ENERGY = 0.998
"""Where the randomized path stops: the estimated share of the energy of the best triplets that is captured. The
estimate errs by at most 0.004 on Gaussian weights, which have no gap anywhere (benchmarks/NOTES.md)."""

OVERSAMPLE = 16
"""Smallest block of the Krylov basis, and how far the basis exceeds the rank at least."""


class Triplets(NamedTuple):
    """Top-r singular triplets: U (out x r), S (r, descending), V (in x r), all fp32 on the CPU or the accelerator."""

    U: torch.Tensor
    S: torch.Tensor
    V: torch.Tensor


@full_precision()
def factorise(
    weight: torch.Tensor,
    rank: int,
    *,
    svd: str = "auto",
    seed: int = 0,
    energy: float = DEFAULT_ENERGY,
    name: str = "weight",
) -> Triplets:
    """Top singular triplets of a matrix.

    Args:
        weight: matrix (out x in) of any floating dtype, on any device but meta; worked on as one fp32 copy, on the
            process's accelerator if there is one with room for it.
        rank: number of triplets r, 1 <= r <= min(out, in).
        svd: "exact", "randomized", or "auto" (exact where the smaller side is at most 256 or 2 r).
        seed: seed of the randomized path.
        energy: where the randomized path stops, in (0, 1): the share of sum sigma_i^2 over the best r triplets that
            it estimates to have captured.
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
    require_triplets(rank, tuple(weight.shape), name)
    smaller = min(weight.shape)
    exact = svd == "exact" or (svd == "auto" and (smaller <= EXACT_LIMIT or 2 * rank >= smaller))
    home, device = weight.device, working_device(weight.device)

    def work(device: torch.device) -> Triplets:
        matrix = weight.detach().to(device=device, dtype=torch.float32)
        if not _all_finite(matrix):
            raise DecompositionError(
                f"The weight of {name} holds NaN or infinity, so it has no singular value decomposition. Check the "
                "base model's checkpoint, or exclude the module."
            )
        try:
            return _exact(matrix, rank) if exact else _randomized(matrix, rank, seed, energy)
        except torch.linalg.LinAlgError as error:
            return _on_cpu(matrix, rank, name, error)

    try:
        triplets = work(device)
    except torch.OutOfMemoryError:  # an accelerator's alone
        logger.warning("%s has no room to decompose %s; the CPU takes its place, and longer.", device, name)
        triplets = work(torch.device("cpu"))
    return Triplets(*(part.to(home) for part in _fix_signs(triplets)))


def require_triplets(rank: int, shape: tuple[int, ...], name: str) -> None:
    """Raises RankError where a weight (... x out x in) does not have that many singular triplets, or none is asked."""
    if rank < 1:
        raise RankError(f"The rank of {name} is {rank}; expected an integer >= 1.")
    smaller = min(shape[-2:])
    if rank > smaller:
        raise RankError(
            f"The rank of {name} is {rank}, but its weight of shape {shape} has only {smaller} singular triplets. "
            f"Lower r to at most {smaller}, give the module an entry in rank_pattern, or exclude it."
        )


@full_precision()
def captured_energy(weight: torch.Tensor, triplets: Triplets) -> float:
    """Share of ||W||_F^2 (0 to 1) that the triplets span: sum diag(U^T W V)^2 / ||W||_F^2; 1 for a zero weight."""
    matrix = weight.detach().to(triplets.U)
    diagonal = ((matrix @ triplets.V) * triplets.U).sum(0)
    return energy_share(diagonal.square().sum(), matrix.square().sum())


def energy_share(part: torch.Tensor, whole: torch.Tensor) -> float:
    """part / whole for energies; all of nothing is 1."""
    return float(part / whole) if whole > 0 else 1.0


def working_device(home: torch.device) -> torch.device:
    """The process's accelerator if there is one, wherever the weight lives; else the weight's own device."""
    if home.type == "cpu" and torch.accelerator.is_available():
        accelerator = torch.accelerator.current_accelerator()
        if accelerator is not None and accelerator.type != "mps":  # MPS runs its SVD on the CPU
            return accelerator
    return home


def _all_finite(matrix: torch.Tensor) -> bool:
    """Whether no entry is NaN or infinite: no finite sum has one. Looked at one by one only where the sum overflows."""
    return bool(torch.isfinite(matrix.sum())) or bool(torch.isfinite(matrix).all())


def _exact(matrix: torch.Tensor, rank: int) -> Triplets:
    U, S, Vh = torch.linalg.svd(matrix, full_matrices=False)
    triplets = Triplets(U[:, :rank], S[:rank], Vh[:rank].mT)
    if not _are_orthonormal(triplets):  # Jacobi's method, an accelerator's, promises less than LAPACK
        raise torch.linalg.LinAlgError("U or V is not orthonormal")
    return triplets


def _randomized(matrix: torch.Tensor, rank: int, seed: int, energy: float) -> Triplets:
    """Rayleigh-Ritz on the block Krylov space of W W^T (Musco and Musco, 2015), grown until it holds the energy.

    A block is half as wide as the rank: as many products as subspace iteration needs for 2 steps reach degree 4 here.
    W^T Q is kept block by block, so the projection costs no further product with W.
    """
    limit = min(matrix.shape)
    width, enough = max(OVERSAMPLE, -(-rank // 2)), min(rank + OVERSAMPLE, limit)
    # drawn on the CPU: the same numbers whatever device factorises
    generator = torch.Generator("cpu").manual_seed(seed)
    shape = matrix.shape[1], min(width, limit)
    sketch = torch.randn(shape, generator=generator, device="cpu", dtype=torch.float32)
    block, captured = orthonormal(matrix @ sketch.to(matrix)), 0.0
    space = Projection.onto(block, matrix)
    while space.Q.shape[1] < limit:
        block = matrix @ space.Z[:, -block.shape[1] :][:, : limit - space.Q.shape[1]]
        for _ in range(2):  # twice is enough against a basis that is orthonormal
            block = orthonormal(block - space.Q @ (space.Q.mT @ block))
        space = space.extended(block, matrix)
        if space.Q.shape[1] < enough:
            continue
        previous, captured = captured, space.energy(rank)
        # gains shrink from step to step, in the end faster than by half: what is missing is about the last one
        if captured - previous <= (1 / energy - 1) * captured:
            break
    triplets = space.triplets(rank, *cholesky_qr(space.Z, space.gram))
    if not _are_orthonormal(triplets):
        space = Projection.onto(torch.linalg.qr(space.Q).Q, matrix)
        triplets = space.triplets(rank, *torch.linalg.qr(space.Z))
    return triplets


class Projection(NamedTuple):
    """W projected onto an orthonormal basis: Q (out x k), Z = W^T Q (in x k), gram = Z^T Z (k x k); Q Z^T is near W."""

    Q: torch.Tensor
    Z: torch.Tensor
    gram: torch.Tensor

    @classmethod
    def onto(cls, Q: torch.Tensor, matrix: torch.Tensor) -> Projection:
        Z = transposed_product(matrix, Q)
        return cls(Q, Z, Z.mT @ Z)

    def extended(self, block: torch.Tensor, matrix: torch.Tensor) -> Projection:
        """With the columns of `block`, orthonormal to Q, added to the basis."""
        new, width = transposed_product(matrix, block), block.shape[1]
        Z = torch.cat((self.Z, new), dim=1)
        cross = Z.mT @ new
        gram = torch.nn.functional.pad(self.gram, (0, width, 0, width))
        gram[:, -width:] = cross
        gram[-width:] = cross.mT
        return Projection(torch.cat((self.Q, block), dim=1), Z, gram)

    def energy(self, rank: int) -> float:
        """Sum of the `rank` largest squared singular values of Q Z^T."""
        return float(torch.linalg.eigvalsh(self.gram)[-rank:].sum())

    def triplets(self, rank: int, P: torch.Tensor, R: torch.Tensor) -> Triplets:
        """The top triplets of Q Z^T, for Z = P R with P orthonormal and R (k x k): those of R^T, turned by Q and P."""
        U, S, Vh = torch.linalg.svd(R.mT)
        return Triplets(self.Q @ U[:, :rank], S[:rank], P @ Vh[:rank].mT)


def transposed_product(matrix: torch.Tensor, block: torch.Tensor) -> torch.Tensor:
    """W^T B (in x n), for W (out x in) and B (out x n), read row by row: 0.7 of the time of W^T B at 64 columns."""
    return (block.mT @ matrix).mT


def orthonormal(X: torch.Tensor) -> torch.Tensor:
    """An orthonormal basis (rows x n) of the columns of X (rows x n): see `cholesky_qr`."""
    return cholesky_qr(X)[0]


def cholesky_qr(X: torch.Tensor, gram: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """X = Q R by CholeskyQR2 (Yamamoto et al., 2015), which is all matrix products; by Householder reflections where X
    is too ill-conditioned for it (beyond about 1e3 in fp32).

    Args:
        X: matrix (rows x n), rows >= n.
        gram: X^T X (n x n), if already at hand.

    Returns:
        Q (rows x n) orthonormal to rounding, R (n x n) upper triangular.
    """
    L1, failed = torch.linalg.cholesky_ex(X.mT @ X if gram is None else gram)
    if failed:
        return torch.linalg.qr(X)
    Q = torch.linalg.solve_triangular(L1.mT, X, upper=True, left=False)
    gram = Q.mT @ Q
    L2, failed = torch.linalg.cholesky_ex(gram)
    if failed or not (gram.diagonal() - 1).abs().max() <= 0.5:  # the second pass repairs only little; so is NaN found
        return torch.linalg.qr(X)
    return torch.linalg.solve_triangular(L2.mT, Q, upper=True, left=False), L2.mT @ L1.mT


def _are_orthonormal(triplets: Triplets) -> bool:
    """Whether U and V keep the promise; NaN does not."""
    limit = floor(triplets.S.shape[0])
    return all(float(gram_minus_identity(P).norm()) <= limit for P in (triplets.U, triplets.V))


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
