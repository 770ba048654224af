"""Recognises the base model: W p for a fixed probe p, one number per output row of each adapted weight.

Other layers, resized embeddings and file names do not count. What matters is that W is the matrix whose triplets the
adapter holds.
"""

from __future__ import annotations

import logging
import math

import torch

from ..errors import BaseMismatchError
from .precision import full_precision

logger = logging.getLogger(__name__)

SAME_STORAGE_LIMIT = 1e-4
"""Largest relative distance allowed between two fp32 matvecs of the same numbers. Summation order alone gives about
sqrt(in) 2^-24, 6e-6 at in = 11008. A training step of the base gives more than this limit."""

SAME_QUANTISATION_LIMIT = {"int8": 0.01, "4bit": 0.05}
"""The same limit for quantised storage, by the bits in its name. Kernels of other devices and versions break ties
differently, and weights that were bfloat16 or fp32 before are quantised differently (measured: nf4 0.022)."""

EXPECTED_ROUNDING = {"float32": 1e-6, "float16": 1e-3, "bfloat16": 8e-3, "float64": 1e-6}
"""Relative distance to expect when one side is stored in this dtype: four times the half-ulp of a random weight.
Measured: bf16 0.002, fp16 0.0002."""

QUANTISED_ROUNDING = 0.2
"""The same for quantised storage (measured: int8 0.006, int4 0.11)."""

DIFFERENT_MODEL_LIMIT = 0.5
"""No change of storage explains a distance beyond this (measured: an unrelated model 3.2)."""


def probe(length: int, device: torch.device) -> torch.Tensor:
    """The fixed probe p (n) for n = `length`, fp32, of entries +-1: the top bit of k * 2654435761 mod 2^32.

    Needs no random generator.
    """
    bits = (torch.arange(1, length + 1, dtype=torch.int64, device=device) * 2654435761) % 2**32 >= 2**31
    return bits.float() * 2 - 1


@full_precision()
def fingerprint(matrix: torch.Tensor) -> torch.Tensor:
    """W p in fp32 (out) for a matrix W (out x in), or (E x out) for a stack (E x out x in).

    Holds one matrix in fp32 at a time.
    """
    if matrix.ndim > 2:
        return torch.stack([fingerprint(one) for one in matrix])
    return matrix.detach().float() @ probe(matrix.shape[-1], matrix.device)


def distance(saved: torch.Tensor, matrix: torch.Tensor) -> float:
    """Distance of a matrix (out x in) from a saved fingerprint (out), relative to the norm of the matrix's own."""
    now = fingerprint(matrix)
    return float((now - saved.to(now)).norm() / now.norm().clamp_min(torch.finfo(now.dtype).tiny))


def check(saved: torch.Tensor, matrix: torch.Tensor, saved_storage: str | None, storage: str, name: str) -> None:
    """Compare a saved fingerprint with the weight at hand.

    Logs a warning if the storages differ and their rounding does not explain the whole distance.

    Args:
        saved: fingerprint in the adapter file (out).
        matrix: the base weight (out x in).
        saved_storage: how the base was stored when the adapter was made ("float32", "4bit-nf4-64"); None if unknown.
        storage: how the base is stored now.
        name: the layer's name, for messages.

    Raises:
        BaseMismatchError: the distance exceeds the limit: that of the storage if both are stored alike, else 0.5.
    """
    found = distance(saved, matrix)
    same_storage = saved_storage == storage
    limit = same_storage_limit(storage) if same_storage else DIFFERENT_MODEL_LIMIT
    limit = max(limit, EXPECTED_ROUNDING[storage_of(saved)])  # mixed precision casts the fingerprint too
    if math.isnan(found) or found > limit:
        raise BaseMismatchError(
            f"The adapter was not trained on this base model: the fingerprint of {name} differs by {found:.2g} "
            f"(relative; at most {limit:g} for a base stored as {storage}, saved from {saved_storage}). Load the base "
            "model that adapter_config.json names in base_model_name_or_path; weights into which an adapter was merged "
            "or folded are not it. To add several adapters of one base, load all of them onto it and call "
            "merge_and_unload(adapter_names=[...]), or export them with `sorsa export-lora`."
        )
    expected = sum(EXPECTED_ROUNDING.get(kind, QUANTISED_ROUNDING) for kind in {saved_storage or storage, storage})
    if not same_storage and found > expected:
        logger.warning(
            "The fingerprint of %s differs by %.2g, more than the rounding from %s to %s explains (%.2g): is this the "
            "base model that the adapter was trained on?", name, found, saved_storage, storage, expected,
        )  # fmt: skip


def same_storage_limit(storage: str) -> float:
    """The largest relative distance to accept between two fingerprints of one weight, both stored as `storage` says."""
    return next((limit for bits, limit in SAME_QUANTISATION_LIMIT.items() if bits in storage), SAME_STORAGE_LIMIT)


def storage_of(weight: torch.Tensor) -> str:
    """How a base weight of any shape is stored: its dtype's name ("float32", "bfloat16", "uint8", ...)."""
    return str(weight.dtype).removeprefix("torch.")
