"""Where PEFT's LoRA keeps a pair L, R of each layer kind: tensor names and shapes; knows no file.

A kind says in `lora_layout`, by way of adapter_config.json, which of these it is: nothing for linear layers,
["embedding"], ["convolution", in, *kernel], ["parameter", name], ["tied", embedding] or ["unsupported", what it is].
["weight"] is a linear whose name PEFT takes for that of an expert: see `renamed_by_peft`.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from typing import Any

import torch
from peft.utils import transformers_weight_conversion as conversion

from ..errors import UnsupportedLayerError

INSIDE = re.compile(r"\.base_layer(?=\.|$)")


def lora_tensors(
    prefix: str, layout: Sequence[Any] | None, L: torch.Tensor, R: torch.Tensor
) -> dict[str, torch.Tensor]:
    """LoRA's tensors of one layer.

    Args:
        prefix: the layer's name in the file, with a dot at the end.
        layout: as above; None for a linear layer.
        L: (out x rank), or a stack of them.
        R: (in x rank), alike.

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


def renamed_by_peft(model: Any, layer: str) -> bool:
    """Whether PEFT, which follows transformers' fused experts, loads a LoRA on a dense layer of a model of experts as
    one on the experts: a shared expert's `gate_proj`, say. It does not where the target is the layer's parameter."""
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    family = getattr(conversion, "_MODEL_TO_CONVERSION_PATTERN", {}).get(model_type)
    names = getattr(conversion, "_MOE_TARGET_MODULE_MAPPING", {}).get(family, {})
    return bool(names) and layer.rpartition(".")[2] in names


def outer_name(layer: str, adapted: Collection[str]) -> str:
    """The name of a layer's target: a parameter's wrappers and an attention's output layer are inside of others.

    Args:
        layer: its name in the file.
        adapted: the names of all layers there: what is inside of one of these is in its `base_layer`, and any other
            module of that name is the model's own.
    """
    return next((layer[: inside.start()] for inside in INSIDE.finditer(layer) if _wraps(inside, adapted)), layer)


def base_name(layer: str, layout: Sequence[Any] | None, adapted: Collection[str]) -> str:
    """What a layer adapts, under its name in the base model: a module, or a parameter; arguments as `outer_name`."""
    if layout and layout[0] == "parameter":
        return layout[1]
    return INSIDE.sub(lambda inside: "" if _wraps(inside, adapted) else inside[0], layer)


def pattern_name(layer: str, layout: Sequence[Any] | None, adapted: Collection[str]) -> str:
    """The name that `rank_pattern` is matched with: a parameter's own; arguments as `outer_name`."""
    return layout[1] if layout and layout[0] == "parameter" else outer_name(layer, adapted)


def _wraps(inside: re.Match[str], adapted: Collection[str]) -> bool:
    return inside.string[: inside.start()] in adapted
