"""Recognises the base model: W p for a fixed probe p, one number per output row of each adapted weight.

Other layers, resized embeddings and file names do not count. What matters is that W is the matrix whose triplets the
adapter holds.
"""

from __future__ import annotations

import logging
import math
from functools import cache

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

UNIT_ROUNDOFF = {"float64": 2.0**-53, "float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}
"""u: the largest relative error of one rounding. Spread evenly, errors have a root mean square of at most u / 3^0.5."""

SHORT = {"float16", "bfloat16"}
"""The 16-bit dtypes."""

QUANTISED_ROUNDING = 0.2
"""The root mean square for quantised storage (measured: int8 0.006, int4 0.11, nf4 0.12, fp4 0.16)."""

CONFIDENCE = 4.0
"""||D|| for a matrix D of independent errors exceeds its root mean square by more than this many times the largest of
its rows' with a probability below exp(-4^2 / 2) = 3e-4. Real roundings have 0.7 of the mean square allowed here."""

SAMPLED_ROWS = 16
"""Rows of a weight that are looked at to see how coarse its values are."""

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

    The two differ by what W p was rounded by (a file cast to 16 bits), and by what W was: another dtype now than then,
    or 16 bits by way of the other 16-bit format. What the values went through is read off the values themselves, so
    that nothing is lost if somebody made them fp32 again. Only of the base at training there is but its dtype: weights
    that had been rounded and made fp32 again are told from the unrounded ones.

    A base that was fine-tuned by less than such a rounding cannot be told from it. These changes of a weight, relative
    to its norm, pass for fine-tuning by independent noise (measured on weights of 32 x 32 to 2048 x 512; the larger
    number is for weights of few large rows): on fp32 0.01%, in a file cast to fp16 0.03% to 0.1%, in a file cast to
    bf16 0.2% to 0.8%, and on a 16-bit base 0.3% to 0.8%, up to 1% if the file is bf16 too.

    Logs one line if rounding explains a difference between equal storages, and a warning by layer if the storages
    differ and rounding does not explain it.

    Args:
        saved: fingerprint in the adapter file (out).
        matrix: the base weight (out x in).
        saved_storage: how the base was stored when the adapter was made ("float32", "4bit-nf4-64"); None if unknown.
        storage: how the base is stored now.
        name: the layer's name, for messages.

    Raises:
        BaseMismatchError: the distance exceeds the limit: what rounding explains if both are stored alike, else 0.5.
    """
    found = distance(saved, matrix)
    if found <= same_storage_limit(storage):
        return
    same_storage = saved_storage == storage
    explained = explained_distance(saved, matrix, roundings(matrix, saved_storage or storage, storage))
    limit = explained + same_storage_limit(storage) if same_storage else DIFFERENT_MODEL_LIMIT
    if math.isnan(found) or found > limit:
        raise BaseMismatchError(
            f"The adapter was not trained on this base model: the fingerprint of {name} differs by {found:.2g} "
            f"(relative; at most {limit:.2g} for a base stored as {storage}, saved from {saved_storage}). Load the "
            "base model that adapter_config.json names in base_model_name_or_path; weights into which an adapter was "
            "merged or folded are not it. To add several adapters of one base, load all of them onto it and call "
            "merge_and_unload(adapter_names=[...]), or export them with `sorsa export-lora`."
        )
    if same_storage:
        through = " and ".join(sorted({precision_of(saved), precision_of(matrix)} & SHORT)) or "another 16-bit format"
        _say_once(
            f"The base model differs from the one that the adapter was trained on (both {storage}) by what rounding to "
            f"{through} explains. It is taken for the same; a short fine-tuning of the base would look alike."
        )
    elif found > explained:
        logger.warning(
            "The fingerprint of %s differs by %.2g, more than the rounding from %s to %s explains (%.2g): is this the "
            "base model that the adapter was trained on?", name, found, saved_storage, storage, explained,
        )  # fmt: skip


def explained_distance(saved: torch.Tensor, matrix: torch.Tensor, kinds: set[str]) -> float:
    """The relative distance that independent roundings explain: that of a fingerprint (out), and those of its weight.

    Args:
        saved: the fingerprint (out).
        matrix: the weight (out x in).
        kinds: storages that the weight went through, each of which rounded it once.
    """
    rows = torch.linalg.vector_norm(matrix.detach().float(), dim=-1)
    parts = [_error(rows, matrix.shape[-1], kind) for kind in kinds]
    parts.append(_error(saved.detach().float().abs(), 1, precision_of(saved)))
    return math.hypot(*parts) / max(float(fingerprint(matrix).norm()), torch.finfo(torch.float32).tiny)


def precision_of(values: torch.Tensor) -> str:
    """The coarsest of bfloat16, float16 and float32 that holds the values, whatever dtype they have now.

    Up to 2^-20: averages of equal 16-bit numbers are off by an fp32 rounding or two. Of a matrix, some rows count.
    """
    step = max(1, values.shape[-2] // SAMPLED_ROWS) if values.ndim > 1 else 1
    sample = (values[..., ::step, :] if values.ndim > 1 else values).detach().float()
    for kind in (torch.bfloat16, torch.float16):
        if bool(((sample.to(kind).float() - sample).abs() <= 2.0**-20 * sample.abs()).all()):
            return storage_of(torch.empty(0, dtype=kind))
    return "float32"


def roundings(values: torch.Tensor, *storages: str) -> set[str]:
    """Storages that values may have gone through: the given ones, what the values say, and of 16 bits the other format.

    fp32 to fp16 to bf16 is another bf16 than fp32 to bf16.
    """
    kinds = {precision_of(values), *storages}
    return kinds | {"bfloat16"} if storages and kinds & SHORT else kinds


def unit_error(kinds: set[str]) -> float:
    """The root mean square of the relative error of one number after independent roundings to each of the storages."""
    return math.hypot(*(UNIT_ROUNDOFF[k] / 3**0.5 if k in UNIT_ROUNDOFF else QUANTISED_ROUNDING for k in kinds))


def _error(rows: torch.Tensor, length: int, storage: str) -> float:
    """A bound on ||D p|| for the rounding D of rows of `length` numbers with the norms `rows` (any shape)."""
    least = (
        (length / 12) ** 0.5 * 2.0**-24 if storage == "float16" else 0.0
    )  # its numbers below 6e-5 are that far apart
    each = unit_error({storage}) * rows + least
    return float(each.norm() + CONFIDENCE * each.max())


@cache
def _say_once(message: str) -> None:
    """Log a line once in this process, although every layer has a reason to."""
    logger.warning(message)


def same_storage_limit(storage: str) -> float:
    """The largest relative distance to accept between two fingerprints of one weight, both stored as `storage` says."""
    return next((limit for bits, limit in SAME_QUANTISATION_LIMIT.items() if bits in storage), SAME_STORAGE_LIMIT)


def storage_of(weight: torch.Tensor) -> str:
    """How a base weight of any shape is stored: its dtype's name ("float32", "bfloat16", "uint8", ...)."""
    return str(weight.dtype).removeprefix("torch.")
