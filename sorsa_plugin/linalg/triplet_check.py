"""Checks that factors are orthonormal, and singular triplets of a weight: one product with W, as for a fingerprint.

    U0^T U0 = V0^T V0 = I,    W^T U0 q = V0 diag(S0) q  for the fixed probe q

The second holds to rounding for every factorisation of `svd.py`; W V0 = U0 diag(S0) holds only as far as a randomised
one is accurate.
"""

from __future__ import annotations

import torch

from ..errors import IncompleteAdapterError
from .fingerprint import DIFFERENT_MODEL_LIMIT, probe, roundings, same_storage_limit, unit_error
from .orthonormality import gram_minus_identity
from .precision import full_precision

SLACK = 10.0
"""Errors allowed, in units of the root mean square of one rounding. W, U0, S0 and V0 are each rounded. The triplets
take from W no larger share of its error than of its norm, so four would do for large weights."""


@full_precision()
def check_orthonormal(U0: torch.Tensor, V0: torch.Tensor, name: str) -> None:
    """Raises IncompleteAdapterError if U0 (out x r) or V0 (in x r), or one of a stack, is not orthonormal to rounding.

    Args:
        U0, V0: the factors, rounded to 16 bits or not.
        name: the layer's name, for messages.
    """
    for letter, factor in (("U0", U0), ("V0", V0)):
        found = float(gram_minus_identity(factor.detach().float()).flatten(-2).norm(dim=-1).max())
        limit = factor.shape[-1] ** 0.5 * (same_storage_limit("float32") + SLACK * unit_error(roundings(factor)))
        if not found <= limit:
            raise IncompleteAdapterError(
                f"{letter} of {name} is not orthonormal: ||{letter}^T {letter} - I|| is {found:.2g}; expected at most "
                f"{limit:.2g}. The adapter file was edited or damaged: take it from the original run again."
            )


@full_precision()
def check_triplets(
    U0: torch.Tensor, S0: torch.Tensor, V0: torch.Tensor, matrix: torch.Tensor, then: str | None, now: str, name: str
) -> None:
    """Raises IncompleteAdapterError if the factors are not triplets of a weight, as far as rounding can tell.

    Args:
        U0, S0, V0: the factors (out x r), (r), (in x r), orthonormal; or stacks of them.
        matrix: the weight (out x in) that they are to be triplets of, or a stack; held in fp32 one at a time.
        then, now: how it was stored when they were made (None if unknown), and how it is stored.
        name: the layer's name, for messages.
    """
    if matrix.ndim > 2:
        for number, parts in enumerate(zip(U0, S0, V0, matrix, strict=True)):
            check_triplets(*parts, then, now, f"{name}[{number}]")
        return
    U0, S0, V0 = (factor.detach().to(matrix.device).float() for factor in (U0, S0, V0))
    rank = S0.shape[-1]
    q = probe(rank, matrix.device) * (1 + torch.arange(rank, device=matrix.device) / rank)  # tells columns apart
    difference = (U0 @ q) @ matrix.detach().float() - V0 @ (S0 * q)
    found = float(difference.norm() / (S0 * q).norm().clamp_min(torch.finfo(torch.float32).tiny))
    limit = SLACK * same_storage_limit(now)
    if not found <= limit:
        limit = min(
            DIFFERENT_MODEL_LIMIT, limit + SLACK * unit_error(roundings(matrix, then or now, now) | roundings(U0))
        )
    if not found <= limit:
        raise IncompleteAdapterError(
            f"U0, S0, V0 of {name} are no singular triplets of its base weight: W^T U0 and V0 S0 differ by {found:.2g} "
            f"(relative; at most {limit:.2g}). Its fingerprint fits, so the adapter file was edited or damaged, or "
            "holds another layer's factors: take it from the original run again."
        )
