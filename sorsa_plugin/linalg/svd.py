"""W -> (U0, S0, V0): the top singular triplets of one matrix; knows no layer, adapter or model.

The factors are fp32, deterministic for a seed, and sign-fixed: the entry of largest magnitude in each column of U is
positive. So another backend or thread count gives the same factors up to rounding. The global random state is never
read or written.
"""

from __future__ import annotations

import logging
import math
from typing import Literal, NamedTuple, get_args

import torch

from ..errors import DecompositionError, RankError, SORSAConfigError
from .orthonormality import floor, gram_minus_identity
from .precision import full_precision

logger = logging.getLogger(__name__)

EXACT_LIMIT = 256
"""`svd="auto"` is exact if the smaller side is at most this: up to there LAPACK is about as fast as the sketch."""

SvdMethod = Literal["auto", "exact", "randomized"]
METHODS = get_args(SvdMethod)

DEFAULT_ENERGY = 0.998
"""The randomized path stops at this estimated share of the energy of the best triplets. The estimate errs by at most
0.004 on Gaussian weights, which have no gap anywhere (benchmarks/NOTES.md)."""

OVERSAMPLE = 16
"""Smallest block of the Krylov basis, and the least number of columns by which the basis exceeds the rank."""


USUAL_EXPONENTS = 16
"""Entries of 2^-16 to 2^16 are factorised as they are. Their fourth powers, which the randomized path forms, are in
fp32 with room for sums over the sides of the matrix."""


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
        weight: matrix (out x in) of any floating dtype, on any device but meta. One fp32 copy is made, on the process's
            accelerator if there is one with room for it.
        rank: number of triplets r, 1 <= r <= min(out, in).
        svd: "exact", "randomized", or "auto" (exact if the smaller side is at most 256 or 2 r).
        seed: seed of the randomized path.
        energy: the randomized path stops at this estimated share of sum sigma_i^2 over the best r triplets, in (0, 1).
        name: the layer's name, for messages.

    Returns:
        Triplets on the device of `weight`.

    Raises:
        RankError: the rank is below 1 or larger than min(out, in).
        SORSAConfigError: svd is none of these.
        DecompositionError: the weight holds NaN or infinity, a singular value is above the largest fp32 number, or
            neither the device nor the CPU converged.
    """
    if svd not in METHODS:
        raise SORSAConfigError(f"svd is {svd!r}; expected one of {', '.join(map(repr, METHODS))}.")
    require_triplets(rank, tuple(weight.shape), name)
    smaller = min(weight.shape)
    exact = svd == "exact" or (svd == "auto" and (smaller <= EXACT_LIMIT or 2 * rank >= smaller))
    home, device = weight.device, working_device(weight.device)

    def work(device: torch.device) -> Triplets:
        matrix = weight.detach().to(device=device, dtype=torch.float32)
        size = _size(matrix)
        if not math.isfinite(size):
            raise DecompositionError(
                f"The weight of {name} holds NaN or infinity, so it has no singular value decomposition. Check the "
                "base model's checkpoint, or exclude the module."
            )
        unit = _unit(size)
        matrix = matrix if unit == 1.0 else matrix / unit
        try:
            triplets = _exact(matrix, rank) if exact else _randomized(matrix, rank, seed, energy)
        except torch.linalg.LinAlgError as error:
            triplets = _on_cpu(matrix, rank, name, error)
        if unit == 1.0:
            return triplets
        largest = float(triplets.S[0]) * unit
        if largest > torch.finfo(torch.float32).max:
            raise DecompositionError(
                f"The largest singular value of the weight of {name} is {largest:.3g}, above the largest fp32 number. "
                "Check the base model's checkpoint, or exclude the module."
            )
        return triplets._replace(S=triplets.S * unit)

    try:
        triplets = work(device)
    except torch.OutOfMemoryError:  # only an accelerator raises this
        logger.warning("%s has no room to decompose %s; the CPU takes its place, and longer.", device, name)
        triplets = work(torch.device("cpu"))
    return Triplets(*(part.to(home) for part in _fix_signs(triplets)))


def require_triplets(rank: int, shape: tuple[int, ...], name: str) -> None:
    """Raises RankError if `rank` is below 1, or above the number of singular triplets of a weight (... x out x in)."""
    if rank < 1:
        raise RankError(f"The rank of {name} is {rank}; expected an integer >= 1.")
    smaller = min(shape[-2:])
    if rank > smaller:
        raise RankError(
            f"The rank of {name} is {rank}, but its weight of shape {shape} has only {smaller} singular triplets. "
            f"Lower r, or the module's entry in rank_pattern, to at most {smaller}, or exclude it."
        )


@full_precision()
def captured_energy(weight: torch.Tensor, triplets: Triplets) -> float:
    """Share of ||W||_F^2 that the triplets span, for W (out x in): sum diag(U^T W V)^2 / ||W||_F^2, from 0 to 1.

    A zero weight gives 1.
    """
    matrix = weight.detach().to(triplets.U)
    unit = _unit(_size(matrix))
    matrix = matrix if unit == 1.0 else matrix / unit
    return energy_share(((matrix @ triplets.V) * triplets.U).sum(0), matrix)


def energy_share(part: torch.Tensor, whole: torch.Tensor) -> float:
    """||part||_F^2 / ||whole||_F^2 of two tensors, whatever their sizes; 1 if `whole` is zero."""
    size = _size(whole)
    if size == 0.0:
        return 1.0
    unit = _unit(size)
    part, whole = (part, whole) if unit == 1.0 else (part / unit, whole / unit)
    total = whole.square().sum()
    return float(part.square().sum() / total.to(part.device))


def working_device(home: torch.device) -> torch.device:
    """Where to factorise a weight that lives on `home`: the process's accelerator if there is one, else `home`."""
    if home.type == "cpu" and torch.accelerator.is_available():
        accelerator = torch.accelerator.current_accelerator()
        if accelerator is not None and accelerator.type != "mps":  # MPS runs its SVD on the CPU
            return accelerator
    return home


def _size(matrix: torch.Tensor) -> float:
    """The largest magnitude of an entry: NaN or infinite if an entry is."""
    return float(torch.linalg.vector_norm(matrix, ord=torch.inf))


def _unit(size: float) -> float:
    """The power of two to divide a matrix of this size by, so that its fourth powers neither vanish nor overflow.

    1 for the sizes that weights have; dividing by it rounds nothing.
    """
    exponent = math.frexp(size)[1]
    return 1.0 if size == 0.0 or abs(exponent) <= USUAL_EXPONENTS else 2.0 ** max(-126, min(exponent, 126))


def _exact(matrix: torch.Tensor, rank: int) -> Triplets:
    U, S, Vh = torch.linalg.svd(matrix, full_matrices=False)
    triplets = Triplets(U[:, :rank], S[:rank], Vh[:rank].mT)
    if not _are_orthonormal(triplets):  # accelerators use Jacobi's method, which promises less than LAPACK
        raise torch.linalg.LinAlgError("U or V is not orthonormal")
    return triplets


def _randomized(matrix: torch.Tensor, rank: int, seed: int, energy: float) -> Triplets:
    """Rayleigh-Ritz on the block Krylov space of W W^T (Musco and Musco, 2015), grown until it holds the energy.

    A block is half as wide as the rank: the products that subspace iteration needs for 2 steps reach degree 4 here. W^T
    Q is kept block by block, so the projection costs no further product with W.
    """
    limit = min(matrix.shape)
    width, enough = max(OVERSAMPLE, -(-rank // 2)), min(rank + OVERSAMPLE, limit)
    # drawn on the CPU, so that every device factorises with the same numbers
    generator = torch.Generator("cpu").manual_seed(seed)
    shape = matrix.shape[1], min(width, limit)
    sketch = torch.randn(shape, generator=generator, device="cpu", dtype=torch.float32)
    block, captured = orthonormal(matrix @ sketch.to(matrix)), 0.0
    space = Projection.onto(block, matrix)
    while space.Q.shape[1] < limit:
        block = matrix @ space.Z[:, -block.shape[1] :][:, : limit - space.Q.shape[1]]
        for _ in range(2):  # two passes are enough, because the basis is orthonormal
            block = orthonormal(block - space.Q @ (space.Q.mT @ block))
        space = space.extended(block, matrix)
        if space.Q.shape[1] < enough:
            continue
        previous, captured = captured, space.energy(rank)
        # in the end each step gains less than half of the step before, so what is missing is about the last gain
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
        """The projection of a matrix (out x in) onto an orthonormal basis Q (out x k)."""
        Z = transposed_product(matrix, Q)
        return cls(Q, Z, Z.mT @ Z)

    def extended(self, block: torch.Tensor, matrix: torch.Tensor) -> Projection:
        """The projection with the columns of `block` (out x n), orthonormal to Q, added to the basis."""
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
        """The top triplets of Q Z^T, for Z = P R with P (in x k) orthonormal and R (k x k): those of R^T, turned."""
        U, S, Vh = torch.linalg.svd(R.mT)
        return Triplets(self.Q @ U[:, :rank], S[:rank], P @ Vh[:rank].mT)


def transposed_product(matrix: torch.Tensor, block: torch.Tensor) -> torch.Tensor:
    """W^T B (in x n), for W (out x in) and B (out x n), read row by row: 0.7 of the time of W^T B at 64 columns."""
    return (block.mT @ matrix).mT


def orthonormal(X: torch.Tensor) -> torch.Tensor:
    """An orthonormal basis (rows x n) of the columns of X (rows x n), by `cholesky_qr`."""
    return cholesky_qr(X)[0]


def cholesky_qr(X: torch.Tensor, gram: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """X = Q R by CholeskyQR2 (Yamamoto et al., 2015), which consists of matrix products alone.

    Uses Householder reflections if X is too ill-conditioned for it (beyond about 1e3 in fp32).

    Args:
        X: matrix (rows x n), rows >= n.
        gram: X^T X (n x n), if already at hand.

    Returns:
        Q (rows x n), orthonormal to rounding, and R (n x n), upper triangular.
    """
    L1, failed = torch.linalg.cholesky_ex(X.mT @ X if gram is None else gram)
    if failed:
        return torch.linalg.qr(X)
    Q = torch.linalg.solve_triangular(L1.mT, X, upper=True, left=False)
    gram = Q.mT @ Q
    L2, failed = torch.linalg.cholesky_ex(gram)
    if failed or not (gram.diagonal() - 1).abs().max() <= 0.5:  # beyond what the second pass repairs, or NaN
        return torch.linalg.qr(X)
    return torch.linalg.solve_triangular(L2.mT, Q, upper=True, left=False), L2.mT @ L1.mT


def _are_orthonormal(triplets: Triplets) -> bool:
    """Whether U and V are orthonormal to 1e-5 sqrt(r); False for NaN."""
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


@full_precision()
def product(U: torch.Tensor, S: torch.Tensor, V: torch.Tensor) -> torch.Tensor:
    """U diag(S) V^T (out x in) of U (out x r), S (r), V (in x r) or stacks of them, in their common dtype."""
    return (U * S.unsqueeze(-2)) @ V.mT
