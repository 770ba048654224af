"""Exports a SORSA adapter as a plain LoRA of rank 2r, from the adapter's two files; knows no model and no base weight.

The change L R^T (`offset_form.py`) is a LoRA as it is: lora_B = L, lora_A = R^T, scale 1. The columns of the pair are
balanced by powers of two, which is exact, so that loaders that round to 16 bits lose no small columns. Layers of lower
rank are padded with zeros, which is exact too. vLLM, TGI and llama.cpp know one rank and alpha per adapter, so the
export has no rank_pattern.
"""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, Literal

import torch
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import save_file

from ..config import SORSAConfig
from ..errors import IncompleteAdapterError, RankError, SORSAConfigError
from ..files.adapter_format import ROOT
from ..files.atomic_directory import appearing_whole, output_path, refuse_occupied
from ..files.saved_adapter import open_tensors, read_config, survey
from ..linalg.offset_form import Parts
from ..model_card import public_name
from .lora_layout import base_of, lora_config, lora_tensors
from .lora_pair import DTYPES, ExportedLayer, lora_pair, singular_values, smallest_rank, total_error

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

Rank = int | Literal["auto"] | None


@dataclass(frozen=True)
class ExportReport:
    """What an export wrote."""

    output: Path
    rank: int
    """r and lora_alpha of the LoRA."""
    layers: tuple[ExportedLayer, ...]
    relative_error: float
    """||L R^T - B A||_F / ||L R^T||_F over all layers together."""
    bytes: int
    """Size of adapter_model.safetensors."""
    carried: tuple[str, ...]
    """Tensors copied verbatim: those of modules_to_save, and embeddings that PEFT saved."""
    lossy: str
    """What the error comes from, in words; empty if the export is exact."""


def export_lora(
    adapter_dir: str | PathLike[str],
    output_dir: str | PathLike[str],
    *,
    rank: Rank = None,
    error: float | None = None,
    dtype: str = "fp32",
) -> ExportReport:
    """Write a SORSA adapter as a LoRA that PEFT, vLLM, TGI and llama.cpp load without this package.

    Works on the files alone. The output appears complete or not at all. A file that lacks whole layers cannot be told
    from an adapter without them, so the layers that are there are exported.

    Args:
        adapter_dir: directory of the adapter's adapter_config.json and adapter_model.safetensors.
        output_dir: directory to make; it may exist and be empty.
        rank: the largest rank of the LoRA. None, or 2r and more, is exact. Below that, each layer is truncated
            optimally, by the singular values of a 2r x 2r matrix. "auto" is the smallest rank that loses at most
            `error`.
        error: with rank="auto" alone: the largest relative error of all changes together (Frobenius norm), in (0, 1),
            rounding to `dtype` included.
        dtype: of the LoRA's tensors: "fp32", "fp16" or "bf16". What is copied verbatim keeps its own.

    Raises:
        ForeignAdapterError: there is no adapter, or it is of another method.
        IncompleteAdapterError: the files are damaged, or do not belong together.
        OutputExistsError: the output exists and is not an empty directory.
        RankError: rank is no integer >= 1, or the error cannot be kept.
        SORSAConfigError: dtype is none of these.
        UnsupportedLayerError: LoRA computes something else on an adapted layer, such as a grouped convolution.
    """
    _check(rank, error, dtype)
    source, output = Path(adapter_dir), output_path(output_dir)
    config = read_config(source)
    refuse_occupied(output)
    tensors: dict[str, torch.Tensor] = {}
    layers: list[ExportedLayer] = []
    with open_tensors(source) as file:
        ranks, carried = survey(file, config)
        full = 2 * max(ranks.values())
        if error is not None:
            rank = smallest_rank([singular_values(*_change(file, name)) for name in ranks], error)
        lora_rank = full if not isinstance(rank, int) else min(rank, full)
        for name in ranks:
            L, R, layer = lora_pair(name, *_change(file, name), lora_rank, DTYPES[dtype])
            tensors |= lora_tensors(f"{ROOT}{name}.", config.lora_layouts.get(name), L, R)
            for other, layout in config.lora_layouts.items():
                if layout == ["tied", name]:
                    tensors |= lora_tensors(f"{ROOT}{other}.", None, R, L)
            layers.append(layer)
        tensors |= {name: file.get_tensor(name) for name in carried}
    total = total_error(layers)
    if error is not None and total > error:
        raise RankError(
            f"error is {error:g}, and {dtype} alone rounds by about as much: rank {lora_rank} in {dtype} has "
            f"{total:.2g}. Allow a larger error, or write fp32."
        )
    truncated = any(layer.rank < 2 * ranks[layer.name] for layer in layers)
    causes = ["truncated"] * truncated + [f"rounded to {dtype}"] * (dtype != "fp32")
    lossy = " and ".join(causes) if total else ""
    with appearing_whole(output) as directory:
        save_file(tensors, directory / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
        size = (directory / SAFETENSORS_WEIGHTS_NAME).stat().st_size
        (directory / "README.md").write_text(_card(config, lora_rank, total, lossy), encoding="utf-8")
        lora_config(config, list(ranks), lora_rank).save_pretrained(str(directory))  # last: without it no adapter
    _warn_about_servers(lora_rank, carried)
    return ExportReport(output, lora_rank, tuple(layers), total, size, tuple(carried), lossy)


def _check(rank: Any, error: Any, dtype: str) -> None:
    if rank == "auto":
        if isinstance(error, bool) or not isinstance(error, (int, float)) or not 0.0 < error < 1.0:
            raise RankError(f"error is {error!r}; expected a number in (0, 1), such as 1e-3, for rank 'auto'.")
    elif error is not None:
        raise RankError(f"error is {error!r} and rank is {rank!r}; expected an error with rank 'auto' alone.")
    elif rank is not None and (isinstance(rank, bool) or not isinstance(rank, int) or rank < 1):
        raise RankError(f"rank is {rank!r}; expected an integer >= 1, 'auto', or None for the exact LoRA of rank 2r.")
    if dtype not in DTYPES:
        raise SORSAConfigError(f"dtype is {dtype!r}; expected one of {', '.join(DTYPES)}.")


def _change(file: Any, layer: str) -> tuple[torch.Tensor, torch.Tensor]:
    """L (out x 2r) and R (in x 2r) of a layer, or stacks of them, fp32."""
    prefix = f"{ROOT}{layer}.sorsa_factors."
    L, R = Parts(*(file.get_tensor(prefix + name).float() for name in Parts._fields)).pair()
    if not (L.isfinite().all() and R.isfinite().all()):
        raise IncompleteAdapterError(
            f"The factors of {layer} hold NaN or infinity; expected finite numbers. The training run diverged or the "
            "file was damaged: export an earlier checkpoint."
        )
    return L, R


def _card(config: SORSAConfig, rank: int, error: float, lossy: str) -> str:
    name = base_of(config)
    base = f"base_model: {json.dumps(name)}\n" if name and name == public_name(name) else ""
    return CARD.format(made=MADE, base=base, rank=rank, error=f"{error:.3g}, {lossy}" if lossy else "none, it is exact")


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
