"""The change of one layer as a LoRA's pair: balanced, truncated, rounded, each with what it costs; knows no file."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from ..errors import IncompleteAdapterError
from ..linalg.offset_form import change_norm

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
"""{word: dtype that a LoRA can be written in}"""


@dataclass(frozen=True)
class ExportedLayer:
    """One layer of an export."""

    name: str
    rank: int
    """Rank of the layer's change in the LoRA, before padding."""
    norm: float
    """||L R^T||_F of the layer's change."""
    relative_error: float
    """||L R^T - B A||_F / ||L R^T||_F of B and A as written: 0 if they are not truncated and in fp32."""


def lora_pair(
    name: str, L: torch.Tensor, R: torch.Tensor, rank: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, ExportedLayer]:
    """A layer's LoRA.

    Args:
        name: the layer's, for messages.
        L, R: (out x 2r) and (in x 2r), or stacks of them, fp32.
        rank: of the LoRA. A layer of fewer columns is padded with zeros.
        dtype: of the LoRA.

    Returns:
        L (out x rank) and R (in x rank), or stacks of them, in that dtype, and what they cost.

    Raises:
        IncompleteAdapterError: a number is not finite, or too large for the dtype.
    """
    norm, error = change_norm(L, R), 0.0
    if rank < L.shape[-1]:
        kept, other, S = truncate(L, R, rank)
        error = float(S[..., rank:].norm()) / norm if norm else 0.0
    else:
        kept, other = balance(L, R)
    columns = kept.shape[-1]
    if dtype != torch.float32:
        kept, other = kept.to(dtype), other.to(dtype)
        if not (kept.isfinite().all() and other.isfinite().all()):
            raise IncompleteAdapterError(
                f"The change of {name} is too large for {dtype}. Export it with --dtype bf16 or fp32."
            )
        lost = change_norm(torch.cat([L, -kept.float()], dim=-1), torch.cat([R, other.float()], dim=-1))
        error = lost / norm if norm else 0.0
    kept, other = (torch.nn.functional.pad(part, (0, rank - columns)) for part in (kept, other))
    return kept, other, ExportedLayer(name, columns, norm, error)


def total_error(layers: Iterable[ExportedLayer]) -> float:
    """The relative error of all layers together."""
    pairs = [(layer.norm, layer.norm * layer.relative_error) for layer in layers]
    lost = math.hypot(*(error for _, error in pairs))
    return lost / math.hypot(*(norm for norm, _ in pairs)) if lost else 0.0


def smallest_rank(spectra: list[torch.Tensor], error: float) -> int:
    """The smallest rank at which truncating every layer to it loses at most `error` of all changes together.

    Args:
        spectra: singular values (2r), or (E x 2r), of each layer's change, descending.
        error: relative, Frobenius norm.
    """
    width = max(spectrum.shape[-1] for spectrum in spectra)
    squares = torch.zeros(width, dtype=torch.float64)
    for spectrum in spectra:
        squares[: spectrum.shape[-1]] += spectrum.double().square().reshape(-1, spectrum.shape[-1]).sum(0)
    tails = squares.flip(0).cumsum(0).flip(0)  # entry k: what a rank of k loses
    return max(1, int((tails > error**2 * tails[0]).sum()))


def balance(L: torch.Tensor, R: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """L (out x k) and R (in x k), or stacks of them, with equal column norms, scaled by powers of two.

    L R^T stays the same, bit for bit, unless a number underflows.
    """
    ratio = R.double().norm(dim=-2, keepdim=True) / L.double().norm(dim=-2, keepdim=True)
    exponent = ratio.log2().div(2).round()
    scale = torch.where(exponent.isfinite(), exponent, 0.0).exp2().to(L.dtype)
    return L * scale, R / scale


def truncate(L: torch.Tensor, R: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The best approximation of L R^T of the given rank, from the triplets of a small matrix.

    With L = Q1 T1 and R = Q2 T2, the singular values of L R^T are those of T1 T2^T (2r x 2r).

    Args:
        L: (out x 2r), or a stack of them.
        R: (in x 2r), or a stack of them.
        rank: columns to keep.

    Returns:
        The balanced pair (out x rank), (in x rank), in the dtype given, and all singular values in float64.
    """
    Q1, T1 = torch.linalg.qr(L.double())
    Q2, T2 = torch.linalg.qr(R.double())
    U, S, Vh = torch.linalg.svd(T1 @ T2.mT, full_matrices=False)
    root = S[..., None, :rank].sqrt()
    return ((Q1 @ U[..., :rank]) * root).to(L.dtype), ((Q2 @ Vh[..., :rank, :].mT) * root).to(R.dtype), S


def singular_values(L: torch.Tensor, R: torch.Tensor) -> torch.Tensor:
    """Singular values of L R^T, or of a stack of them, descending, in float64."""
    return truncate(L, R, 1)[2]
