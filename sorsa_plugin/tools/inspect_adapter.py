"""Shows what training did to an adapter, from its two files alone: gaps, singular values, size of the change."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from peft.utils import SAFETENSORS_WEIGHTS_NAME

from ..config import SORSAConfig
from ..files.adapter_format import FROZEN, OFFSETS, ROOT, base_name
from ..files.json_values import json_values
from ..files.saved_adapter import open_tensors, read_config, survey
from ..linalg.offset_form import Parts, change_norm
from ..regularizer.engines import WholeFactors
from ..regularizer.gaps import all_gaps
from ..regularizer.trained_factors import Factor
from .trained_tokens import TRAINED_TOKENS


@dataclass(frozen=True)
class LayerSummary:
    """One adapted layer. Norms are Frobenius norms; of a stack of matrices (experts), over all of them."""

    name: str
    """The layer's name in the base model: a module, or a parameter that is no module's weight."""
    matrices: int
    """Number of matrices (out x in) in the weight; 1 for all but stacks of experts."""
    out_features: int
    in_features: int
    rank: int
    gap_U: float
    """||U^T U - I||, 0 for orthonormal columns; the largest of a stack."""
    gap_V: float
    S_min: float
    S_max: float
    relative_dS: float
    """||dS|| / ||S0||: how far the singular values moved."""
    change: float
    """||L R^T||, the size of the change that is added to the base weight."""
    relative_change: float
    """||L R^T|| / ||S0||: relative to the part of the base weight that is trained."""
    fingerprint: float
    """||W p||, the norm of the base weight's fingerprint: five digits tell base models apart."""

    @property
    def finite(self) -> bool:
        """Whether all of its numbers are finite: False if the factors hold NaN or infinity."""
        return all(math.isfinite(value) for value in asdict(self).values() if isinstance(value, float))


@dataclass(frozen=True)
class AdapterSummary:
    """A saved adapter."""

    directory: Path
    config: SORSAConfig
    layers: tuple[LayerSummary, ...]
    dtypes: tuple[str, ...]
    """Dtypes in which the factors are stored."""
    trainable: int
    """Number of trained values, without those of modules_to_save and of trained tokens."""
    carried: tuple[str, ...]
    """Tensors held as a whole: those of modules_to_save, and embeddings that PEFT saved."""
    trained_tokens: dict[str, int]
    """{embedding: number of rows that were trained in full} of trainable_token_indices."""
    bytes: int
    """Size of adapter_model.safetensors."""

    def to_json(self) -> dict[str, Any]:
        """The same in JSON's types; numbers that are not finite are None."""
        config = self.config.to_dict() | {"resolved_gamma": self.config.resolved_gamma}
        names = ("directory", "dtypes", "trainable", "carried", "trained_tokens", "bytes")
        summary = {name: getattr(self, name) for name in names}
        return json_values({**summary, "config": config, "layers": [asdict(layer) for layer in self.layers]})


def inspect_adapter(adapter_dir: str | PathLike[str]) -> AdapterSummary:
    """Summarise a saved adapter from its files; needs no base model.

    Raises:
        ForeignAdapterError: there is no adapter, or it is of another method.
        IncompleteAdapterError: its files are damaged, or do not belong together.
    """
    source = Path(adapter_dir)
    config = read_config(source)
    layers, dtypes, trainable = [], set(), 0
    with open_tensors(source) as file:
        ranks, carried = survey(file, config)
        for name, rank in ranks.items():
            prefix = f"{ROOT}{name}.sorsa_factors."
            tensors = {part: file.get_tensor(prefix + part) for part in (*OFFSETS, *FROZEN)}
            dtypes |= {str(tensors[part].dtype).removeprefix("torch.") for part in OFFSETS}
            trainable += sum(tensors[part].numel() for part in OFFSETS)
            shown = base_name(name, config.lora_layouts.get(name), ranks)
            layers.append(_summarise(shown, rank, {part: tensor.float() for part, tensor in tensors.items()}))
        whole = tuple(name for name in carried if not name.endswith(TRAINED_TOKENS))
        rows = [name for name in carried if name not in whole]
        tokens = {_embedding(name): file.get_slice(name).get_shape()[0] for name in rows}
    size = (source / SAFETENSORS_WEIGHTS_NAME).stat().st_size
    return AdapterSummary(source, config, tuple(layers), tuple(sorted(dtypes)), trainable, whole, tokens, size)


def _embedding(name: str) -> str:
    return name.removeprefix(ROOT).removesuffix(TRAINED_TOKENS)


def _summarise(name: str, rank: int, tensors: dict[str, torch.Tensor]) -> LayerSummary:
    parts = Parts(*(tensors[part] for part in Parts._fields))
    factors = [
        Factor("U", parts.U0, torch.nn.Parameter(parts.dU)),
        Factor("V", parts.V0, torch.nn.Parameter(parts.dV)),
    ]
    gap_U, gap_V = (float(all_gaps(WholeFactors(None).shares([factor])).max()) for factor in factors)
    S, start = parts.S0 + parts.dS, float(parts.S0.norm())
    change = change_norm(*parts.pair())
    return LayerSummary(
        name,
        matrices=factors[0].matrices,
        out_features=parts.U0.shape[-2],
        in_features=parts.V0.shape[-2],
        rank=rank,
        gap_U=gap_U,
        gap_V=gap_V,
        S_min=float(S.min()),
        S_max=float(S.max()),
        relative_dS=float(parts.dS.norm()) / start if start else 0.0,
        change=change,
        relative_change=change / start if start else 0.0,
        fingerprint=float(tensors["fingerprint"].norm()),
    )
