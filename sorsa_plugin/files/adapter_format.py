"""The adapter file: the names and shapes of an adapter's tensors, and which of them make it complete.

    base_model.model.<layer>.sorsa_factors.{dU,dS,dV,U0,S0,V0,fingerprint}

Kinds that are not linear leave a layout in adapter_config.json (`lora_layouts`). It says where PEFT's LoRA keeps the
pair L, R of such a layer: ["embedding"], ["convolution", in, *kernel], ["parameter", name], ["tied", embedding],
["weight"] (in older files: a linear layer whose name PEFT takes for that of an expert) or ["unsupported", what it is].
Linear layers have none. The tensors do not say which layout a layer has, nor which layers are absent, so
adapter_config.json also counts the layers by layout (`adapted_layers`).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import torch

from ..errors import IncompleteAdapterError

OFFSETS = ("dU", "dS", "dV")
"""The trained tensors of a layer's adapter."""

FROZEN = ("U0", "S0", "V0", "fingerprint")
"""The tensors that an adapter starts from, and the fingerprint of the base weight."""

ROOT = "base_model.model."
"""The beginning of every name in an adapter file of PEFT."""

FACTOR = re.compile(rf"{re.escape(ROOT)}(?P<layer>.+)\.sorsa_factors\.(?P<part>\w+)")

WRAPPERS = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")
"""Names under which torch.compile, activation checkpointing and FSDP hold the module that they wrap."""

FACTOR_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
"""Dtypes that factors are read from. Of 8 bits, no factor would still be orthonormal."""

Shapes = Mapping[str, tuple[int, ...]]


def factor_shapes(
    out_features: int, in_features: int, rank: int, stack: Sequence[int] = ()
) -> dict[str, tuple[int, ...]]:
    """{tensor: shape} of an adapter on a weight (out x in); on a stack of weights, shapes begin with `stack`."""
    U, S, V = (*stack, out_features, rank), (*stack, rank), (*stack, in_features, rank)
    return {"dU": U, "dS": S, "dV": V, "U0": U, "S0": S, "V0": V, "fingerprint": (*stack, out_features)}


def complete_names(state_dict: Any, prefix: str, shapes: Shapes) -> list[str]:
    """The names of an adapter's tensors in a state dict: all of them or none.

    A part of them would silently be another adapter.

    Args:
        state_dict: {name: anything with a shape and a dtype}.
        prefix: the beginning of the names there, with a dot at the end.
        shapes: {tensor: shape}; see `factor_shapes`.

    Raises:
        IncompleteAdapterError: some are absent, have another shape, or a dtype that is not in `FACTOR_DTYPES`.
    """
    present = [name for name in shapes if prefix + name in state_dict]
    if present and len(present) < len(shapes):
        absent = ", ".join(name for name in shapes if name not in present)
        raise IncompleteAdapterError(
            f"The adapter file lacks {absent} of {prefix.removesuffix('.')}; expected {', '.join(shapes)}. The file "
            "is truncated, was edited, or was saved by another method: take it from the original run again."
        )
    for name in present:
        dtype = state_dict[prefix + name].dtype
        if dtype not in FACTOR_DTYPES:
            raise IncompleteAdapterError(
                f"{prefix}{name} is stored as {str(dtype).removeprefix('torch.')} in the adapter file; expected "
                "float32 (or bfloat16, float16, float64). It was converted after it was saved: take the file from the "
                "original run again."
            )
        found = tuple(state_dict[prefix + name].shape)
        if found != shapes[name]:
            raise IncompleteAdapterError(
                f"{prefix}{name} has shape {found} in the adapter file; expected {shapes[name]}. The rank in "
                "adapter_config.json, or the base model, is not the one the file was written with."
            )
    return present


def count_layouts(layers: Iterable[str], layouts: Mapping[str, Sequence[Any]]) -> dict[str, int]:
    """{layout: number of layers}, as adapter_config.json keeps it.

    Args:
        layers: the names of all adapted layers, those that are tied to others included.
        layouts: `lora_layouts`.
    """
    return dict(sorted(Counter(layouts[name][0] if name in layouts else "linear" for name in layers).items()))


# -- names of layers -------------------------------------------------------------------------------------------------

INSIDE = re.compile(r"\.base_layer(?=\.|$)")


def plain_name(name: str) -> str:
    """The name of a layer without those of wrappers around it and around the modules that hold it."""
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def plain_layouts(layouts: Mapping[str, Sequence[Any]]) -> dict[str, list[Any]]:
    """`lora_layouts` of an adapter that was saved from a wrapped model, with the names of the model itself."""
    return {
        plain_name(layer): [plain_name(entry) if isinstance(entry, str) else entry for entry in layout]
        for layer, layout in layouts.items()
    }


def outer_name(layer: str, adapted: Collection[str]) -> str:
    """The name of the module that a layer replaces in the model.

    It differs from the layer's own name if the layer is inside another: the wrapper of a second parameter, or an
    attention's output layer.

    Args:
        layer: its name in the file.
        adapted: the names of all layers there. A `base_layer` under one of these names is the wrapped module. Any other
            module called `base_layer` is the model's own.
    """
    return next((layer[: inside.start()] for inside in INSIDE.finditer(layer) if _wraps(inside, adapted)), layer)


def base_name(layer: str, layout: Sequence[Any] | None, adapted: Collection[str]) -> str:
    """The module or parameter that a layer adapts, under its name in the base model.

    Args:
        layer: its name in the file.
        layout: its entry in `lora_layouts`, or None.
        adapted: as in `outer_name`.
    """
    if layout and layout[0] == "parameter":
        return layout[1]
    return INSIDE.sub(lambda inside: "" if _wraps(inside, adapted) else inside[0], layer)


def pattern_name(layer: str, layout: Sequence[Any] | None, adapted: Collection[str]) -> str:
    """The name that `rank_pattern` is matched with: a parameter's own, else `outer_name`. Arguments as `base_name`."""
    return layout[1] if layout and layout[0] == "parameter" else outer_name(layer, adapted)


def _wraps(inside: re.Match[str], adapted: Collection[str]) -> bool:
    return inside.string[: inside.start()] in adapted
