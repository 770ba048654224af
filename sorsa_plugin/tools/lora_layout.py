"""What a LoRA calls its tensors on each kind of layer, and the config that goes with them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from peft import LoraConfig

from ..config import SORSAConfig
from ..errors import UnsupportedLayerError
from ..files.adapter_format import outer_name


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


def lora_config(config: SORSAConfig, layers: list[str], rank: int) -> LoraConfig:
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
        base_model_name_or_path=base_of(config),
        revision=config.revision,
        inference_mode=True,
        auto_mapping=config.auto_mapping,
    )
    # Regular expressions and choices of layers are spelled out above, because not every server reads them. Sorted,
    # because PEFT's own set has another order in every process.
    lora.target_modules = sorted(targets)
    return lora


def base_of(config: SORSAConfig) -> str | None:
    """The model that the change is to be added to: never one that stores residuals."""
    return config.full_precision_base or config.base_model_name_or_path
