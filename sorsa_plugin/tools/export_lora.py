"""Exports a SORSA adapter as a plain LoRA of rank 2r, from the adapter's two files; knows no model and no base weight.

The change L R^T (`offset_form.py`) is a LoRA as it is: lora_B = L, lora_A = R^T, scale 1. The columns of the pair are
balanced by powers of two, which is exact, so that loaders that round to 16 bits lose no small columns. Layers of lower
rank are padded with zeros, which is exact too. vLLM, TGI and llama.cpp know one rank and alpha per adapter, so the
export has no rank_pattern.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import save_file

from ..config import SORSAConfig
from ..errors import IncompleteAdapterError, RankError, UnsupportedLayerError
from ..files.adapter_format import ROOT, outer_name
from ..files.atomic_directory import appearing_whole, output_path, refuse_occupied
from ..files.saved_adapter import open_tensors, read_config, survey
from ..linalg.offset_form import Parts, change_norm
from ..model_card import public_name

logger = logging.getLogger(__name__)

VLLM_DEFAULT_RANK = 16
VLLM_RANKS = (16, 32, 64, 128, 256, 320, 512)
"""Values of vLLM's --max-lora-rank (`MaxLoRARanks` in its config/lora.py) from its default up."""

MADE = "Made by `sorsa export-lora`"
"""What an export's card says, so that a later export may replace it. (A second key in the file's metadata would make
the file differ from run to run: safetensors keeps them in no order.)"""

CARD = """---
{base}library_name: peft
tags:
- lora
- sorsa
---

# LoRA of rank {rank}, exported from a SORSA adapter

{made} (SORSA: [arXiv 2409.00055](https://arxiv.org/abs/2409.00055)). It is an ordinary LoRA:
r = lora_alpha = {rank}, so its scale is 1. Relative error of the change (Frobenius norm): {error}.
"""


@dataclass(frozen=True)
class ExportedLayer:
    """One layer of an export."""

    name: str
    rank: int
    """Rank of the layer's change in the LoRA, before padding."""
    norm: float
    """||L R^T||_F of the layer's change."""
    relative_error: float
    """||L R^T - B A||_F / ||L R^T||_F, the smallest possible at this rank; 0 if not truncated."""


@dataclass(frozen=True)
class ExportReport:
    """What an export wrote."""

    output: Path
    rank: int
    """r and lora_alpha of the LoRA."""
    layers: tuple[ExportedLayer, ...]
    relative_error: float
    """The same over all layers together."""
    bytes: int
    """Size of adapter_model.safetensors."""
    carried: tuple[str, ...]
    """Tensors copied verbatim: those of modules_to_save, and embeddings that PEFT saved."""


def export_lora(
    adapter_dir: str | PathLike[str], output_dir: str | PathLike[str], *, rank: int | None = None
) -> ExportReport:
    """Write a SORSA adapter as a LoRA that PEFT, vLLM, TGI and llama.cpp load without this package.

    Works on the files alone. The output appears complete or not at all. A file that lacks whole layers cannot be told
    from an adapter without them, so the layers that are there are exported.

    Args:
        adapter_dir: directory of the adapter's adapter_config.json and adapter_model.safetensors.
        output_dir: directory to make; it may exist and be empty.
        rank: the largest rank of the LoRA. None, or 2r and more, is exact. Below that, each layer is truncated
            optimally, by the singular values of a 2r x 2r matrix.

    Raises:
        ForeignAdapterError: there is no adapter, or it is of another method.
        IncompleteAdapterError: the files are damaged, or do not belong together.
        OutputExistsError: the output exists and is not an empty directory.
        RankError: rank is no integer >= 1.
        UnsupportedLayerError: LoRA computes something else on an adapted layer, such as a grouped convolution.
    """
    if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int) or rank < 1):
        raise RankError(f"rank is {rank!r}; expected an integer >= 1, or None for the exact LoRA of rank 2r.")
    source, output = Path(adapter_dir), output_path(output_dir)
    config = read_config(source)
    refuse_occupied(output)
    tensors: dict[str, torch.Tensor] = {}
    layers: list[ExportedLayer] = []
    with open_tensors(source) as file:
        ranks, carried = survey(file, config)
        full = 2 * max(ranks.values())
        lora_rank = full if rank is None else min(rank, full)
        for name, own_rank in ranks.items():
            L, R, layer = _convert(file, name, own_rank, lora_rank)
            tensors |= lora_tensors(f"{ROOT}{name}.", config.lora_layouts.get(name), L, R)
            for other, layout in config.lora_layouts.items():
                if layout == ["tied", name]:
                    tensors |= lora_tensors(f"{ROOT}{other}.", None, R, L)
            layers.append(layer)
        tensors |= {name: file.get_tensor(name) for name in carried}
    error = _total_error(layers)
    with appearing_whole(output) as directory:
        save_file(tensors, directory / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
        size = (directory / SAFETENSORS_WEIGHTS_NAME).stat().st_size
        (directory / "README.md").write_text(_card(config, lora_rank, error), encoding="utf-8")
        _lora_config(config, list(ranks), lora_rank).save_pretrained(str(directory))  # last: without it no adapter
    _warn_about_servers(lora_rank, carried)
    return ExportReport(output, lora_rank, tuple(layers), error, size, tuple(carried))


# -- the pair --------------------------------------------------------------------------------------------------------


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


def _convert(file: Any, layer: str, own_rank: int, rank: int) -> tuple[torch.Tensor, torch.Tensor, ExportedLayer]:
    """L (out x rank) and R (in x rank) of a layer's LoRA, or stacks of them."""
    prefix = f"{ROOT}{layer}.sorsa_factors."
    L, R = Parts(*(file.get_tensor(prefix + name).float() for name in Parts._fields)).pair()
    if not (L.isfinite().all() and R.isfinite().all()):
        raise IncompleteAdapterError(
            f"The factors of {layer} hold NaN or infinity; expected finite numbers. The training run diverged or the "
            "file was damaged: export an earlier checkpoint."
        )
    norm, error = change_norm(L, R), 0.0
    if rank < 2 * own_rank:
        L, R, S = truncate(L, R, rank)
        error = float(S[..., rank:].norm()) / norm if norm else 0.0
    else:
        L, R = balance(L, R)
    kept = L.shape[-1]
    L, R = (torch.nn.functional.pad(part, (0, rank - kept)) for part in (L, R))
    return L, R, ExportedLayer(layer, kept, norm, error)


def _total_error(layers: list[ExportedLayer]) -> float:
    lost = math.hypot(*(layer.norm * layer.relative_error for layer in layers))
    return lost / math.hypot(*(layer.norm for layer in layers)) if lost else 0.0


# -- LoRA's tensors --------------------------------------------------------------------------------------------------


def lora_tensors(
    prefix: str, layout: Sequence[Any] | None, L: torch.Tensor, R: torch.Tensor
) -> dict[str, torch.Tensor]:
    """{name in the file: tensor} of one layer's LoRA.

    Args:
        prefix: the layer's name in the file, with a dot at the end.
        layout: see `files/adapter_format.py`; None for a linear layer.
        L: (out x rank), or a stack (E x out x rank).
        R: (in x rank), or a stack (E x in x rank).

    Raises:
        UnsupportedLayerError: LoRA computes something else on such a layer.
    """
    kind, *details = layout or ["linear"]
    A, B = R.mT, L
    names = ("lora_A.weight", "lora_B.weight")
    if kind == "embedding":
        names = ("lora_embedding_A", "lora_embedding_B")
    elif kind == "convolution":
        A, B = A.reshape(-1, *details), B.reshape(*B.shape, *(1,) * (len(details) - 1))
    elif kind == "parameter" and A.ndim == 3:  # experts: A stacked along the rank, B with the expert's index last
        A, B = A.flatten(0, 1), B.permute(1, 2, 0).flatten(1)
    elif kind == "unsupported":
        raise UnsupportedLayerError(
            f"{prefix.removesuffix('.')} is {details[0]}; expected layers that LoRA computes alike. Merge the adapter "
            "into the base model instead, with merge_and_unload()."
        )
    return {prefix + name: tensor.contiguous() for name, tensor in zip(names, (A, B), strict=True)}


# -- writing ---------------------------------------------------------------------------------------------------------


def _lora_config(config: SORSAConfig, layers: list[str], rank: int) -> LoraConfig:
    """The LoRA's configuration: only options that PEFT's LoRA has, and target_modules as short as possible."""
    targets: Any = config.target_modules
    kinds = {name: layout[0] for name, layout in config.lora_layouts.items()}
    tied = [name for name, kind in kinds.items() if kind == "tied"]
    weights = {f"{name}.weight" for name in layers if kinds.get(name) == "weight"}
    chosen = config.exclude_modules or config.layers_to_transform is not None
    if not isinstance(targets, set) or chosen or tied or weights:
        modules = [name for name in layers if kinds.get(name) not in ("parameter", "weight")]
        targets = {outer_name(name, layers) for name in modules} | set(tied)
    parameters = sorted({*(config.target_parameters or []), *weights})
    lora = LoraConfig(
        r=rank,
        lora_alpha=rank,
        lora_dropout=config.sorsa_dropout,
        target_modules=[],
        fan_in_fan_out=config.fan_in_fan_out,
        target_parameters=parameters or None,
        modules_to_save=config.modules_to_save,
        trainable_token_indices=config.trainable_token_indices,
        task_type=config.task_type,
        base_model_name_or_path=_base_of(config),
        revision=config.revision,
        inference_mode=True,
        auto_mapping=config.auto_mapping,
    )
    # Regular expressions and choices of layers are spelled out above, because not every server reads them. Sorted,
    # because PEFT's own set has another order in every process.
    lora.target_modules = sorted(targets)
    return lora


def _base_of(config: SORSAConfig) -> str | None:
    """The model that the change is to be added to: never one that stores residuals."""
    return config.full_precision_base or config.base_model_name_or_path


def _card(config: SORSAConfig, rank: int, error: float) -> str:
    name = _base_of(config)
    base = f"base_model: {json.dumps(name)}\n" if name and name == public_name(name) else ""
    return CARD.format(
        made=MADE, base=base, rank=rank, error=f"{error:.3g}, truncated" if error else "none, it is exact"
    )


def _warn_about_servers(rank: int, carried: list[str]) -> None:
    if rank > VLLM_RANKS[-1]:
        logger.warning(
            "The LoRA has rank %d, and vLLM takes at most %d. Truncate it with --rank %d, or merge the adapter into "
            "the base model for vLLM.", rank, VLLM_RANKS[-1], VLLM_RANKS[-1],
        )  # fmt: skip
    elif rank > VLLM_DEFAULT_RANK:
        enough = next(known for known in VLLM_RANKS if known >= rank)
        logger.warning(
            "The LoRA has rank %d, and vLLM's default --max-lora-rank is %d. Start it with --max-lora-rank %d, or "
            "truncate with --rank %d.", rank, VLLM_DEFAULT_RANK, enough, VLLM_DEFAULT_RANK,
        )  # fmt: skip
    if carried:
        logger.warning(
            "The LoRA also carries whole tensors (modules_to_save or embeddings; %d, the first is %s). PEFT loads "
            "them; vLLM, TGI and llama.cpp refuse or ignore them. Merge the adapter into the base model for those.",
            len(carried), carried[0],
        )  # fmt: skip
