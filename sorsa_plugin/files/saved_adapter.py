"""Reads a saved adapter from its two files and checks that they are complete; knows no model and no base weight."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, PeftType
from safetensors import SafetensorError, safe_open

from ..compat.peft import PEFT_TYPE_TO_PREFIX_MAPPING, check_target_module_exists
from ..config import SORSAConfig
from ..errors import ForeignAdapterError, IncompleteAdapterError
from .adapter_format import (
    FACTOR,
    FROZEN,
    OFFSETS,
    ROOT,
    base_name,
    complete_names,
    count_layouts,
    factor_shapes,
    outer_name,
    pattern_name,
    plain_name,
)
from .json_values import UNREADABLE
from .ranks import rank_of
from .time_limit import time_limit

logger = logging.getLogger(__name__)

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""safetensors' names of the dtypes that factors may have."""


def read_config(source: Path) -> SORSAConfig:
    """The adapter's configuration.

    Raises:
        ForeignAdapterError: there is no configuration, or it is of another method.
        IncompleteAdapterError: it cannot be read, or holds an option that cannot be honoured.
    """
    path = source / CONFIG_NAME
    if not path.is_file():
        below = sorted(child.parent.name for child in source.glob(f"*/{CONFIG_NAME}"))
        remedy = f"Its adapters are in {', '.join(below)}: give one of these." if below else "Give the directory."
        raise ForeignAdapterError(f"{source} holds no {CONFIG_NAME}; expected the directory of an adapter. {remedy}")
    try:
        options = json.loads(path.read_text(encoding="utf-8"))
        kind = options["peft_type"]
        config = SORSAConfig.from_pretrained(str(source)) if kind == "SORSA" else None
        if config is not None and config.adapted_layers is None and options.get("lora_layouts", {}) is None:
            raise ValueError("lora_layouts is None; expected a table, as every adapter is saved with")
    except UNREADABLE as error:
        raise IncompleteAdapterError(
            f"{path} cannot be read as an adapter's configuration ({error!r}); expected JSON with a peft_type and "
            "options that it can have. Take it from the original run again."
        ) from error
    if config is None:
        raise ForeignAdapterError(
            f"{path} says peft_type {kind!r}; expected 'SORSA'. PEFT itself loads and merges this adapter, and vLLM "
            "serves it if it is a LoRA; peft.convert_to_lora makes one of many other methods."
        )
    return config


class Header(NamedTuple):
    """Shape and dtype of a stored tensor; of dtypes that no factor has, safetensors' name."""

    shape: tuple[int, ...]
    dtype: torch.dtype | str


def _header(tensor: Any) -> Header:
    dtype = tensor.get_dtype()
    return Header(tuple(tensor.get_shape()), DTYPES.get(dtype, dtype))


@contextmanager
def open_tensors(source: Path) -> Iterator[Any]:
    """The adapter's safetensors file, open for reading tensor by tensor.

    Raises:
        IncompleteAdapterError: the file is absent or damaged.
    """
    path = source / SAFETENSORS_WEIGHTS_NAME
    if not path.is_file():
        found = ", ".join(sorted(child.name for child in source.glob("adapter_model*"))) or "no adapter_model file"
        raise IncompleteAdapterError(
            f"{source} holds {found}; expected {path.name}. Save the adapter with save_pretrained(directory), which "
            "writes safetensors."
        )
    try:
        file = safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise IncompleteAdapterError(
            f"{path} cannot be read ({error}); expected a complete safetensors file. It is truncated or was damaged: "
            "take it from the original run again."
        ) from error
    with file:
        yield file


def survey(file: Any, config: SORSAConfig) -> tuple[dict[str, int], list[str]]:
    """Check all names and shapes of an adapter file.

    Args:
        file: an open safetensors file; see `open_tensors`.
        config: the adapter's.

    Returns:
        {layer: its rank r}, and the names of the other tensors, which are copied as they are.

    Raises:
        ForeignAdapterError, IncompleteAdapterError: the files are damaged, or do not belong together.
    """
    shapes = {name: _header(file.get_slice(name)) for name in file.keys()}  # noqa: SIM118
    matches = {name: FACTOR.fullmatch(name) for name in shapes}
    parts = (*OFFSETS, *FROZEN)
    layers = dict.fromkeys(match["layer"] for match in matches.values() if match and match["part"] in parts)
    carried = [name for name, match in matches.items() if not match]
    unknown = [name for name, match in matches.items() if match and match["part"] not in parts]
    known = (PEFT_TYPE_TO_PREFIX_MAPPING[PeftType.TRAINABLE_TOKENS],) if config.trainable_token_indices else ()
    methods = tuple(f".{prefix}" for prefix in PEFT_TYPE_TO_PREFIX_MAPPING.values() if prefix not in known)
    strange = [
        name for name in carried if not name.startswith(ROOT) or any(method in name for method in methods)
    ] + unknown
    if strange or not layers:
        found = strange[0] if strange else ", ".join(list(shapes)[:1]) or "no tensor"
        raise ForeignAdapterError(
            f"The adapter file holds {found}, and factors of {len(layers)} SORSA layers; expected names such as "
            f"{ROOT}<layer>.sorsa_factors.dU. It was written by another method: take the file that belongs to the "
            f"{CONFIG_NAME} beside it."
        )
    wrapped = [layer for layer in layers if plain_name(layer) != layer]
    if wrapped:
        raise IncompleteAdapterError(
            f"The adapter was saved from a compiled or wrapped model: its names are such as {wrapped[0]}; expected "
            f"{plain_name(wrapped[0])}. Load it onto the plain model and save it again: "
            "PeftModel.from_pretrained(model, directory).save_pretrained(another)."
        )
    with time_limit("Matching the layers of the adapter file"):
        ranks = _ranks(shapes, config, layers)
    _check_layouts(config, shapes, layers)
    if config.modules_to_save and not any(f"{name}." in key for name in config.modules_to_save for key in carried):
        raise IncompleteAdapterError(
            f"The adapter file has no tensors for modules_to_save={config.modules_to_save}; expected those of one "
            "module at least. It is truncated or was edited: take it from the original run again."
        )
    return ranks, carried


def _ranks(shapes: Mapping[str, Header], config: SORSAConfig, layers: Collection[str]) -> dict[str, int]:
    """{layer: rank}, after a check of its tensors' shapes, and that the config selects it."""
    ranks = {}
    for layer in layers:
        prefix = f"{ROOT}{layer}.sorsa_factors."
        layout = config.lora_layouts.get(layer)
        U, V = (shapes.get(prefix + name, Header((0, 0), torch.float32)) for name in ("U0", "V0"))
        rows = [next(iter(factor.shape[-2:]), 0) for factor in (U, V)]
        rank = rank_of(config, pattern_name(layer, layout, layers), *rows)
        complete_names(shapes, prefix, factor_shapes(rows[0], rows[1], rank, tuple(U.shape[:-2])))
        parameter = layout is not None and layout[0] == "parameter"
        any_linear = config.target_modules in (None, "all-linear")
        if not (parameter or any_linear or check_target_module_exists(config, outer_name(layer, layers))):
            raise IncompleteAdapterError(
                f"The adapter file has factors of {layer}, which target_modules in {CONFIG_NAME} does not select. The "
                "two belong to different adapters: take both from the original run again."
            )
        ranks[layer] = rank
    return ranks


def _check_layouts(config: SORSAConfig, shapes: Mapping[str, Header], layers: Collection[str]) -> None:
    """Raises IncompleteAdapterError if `lora_layouts` does not fit the layers of the file, or some are absent."""
    tied = {name: layout for name, layout in config.lora_layouts.items() if layout[0] == "tied"}
    for name, layout in config.lora_layouts.items():
        kind, *details = layout
        known = details[0] in layers if kind == "tied" else name in layers
        width = shapes[f"{ROOT}{name}.sorsa_factors.V0"].shape[-2] if name in layers else 0
        if not known or (kind == "convolution" and math.prod(details) != width):
            raise IncompleteAdapterError(
                f"lora_layouts in {CONFIG_NAME} says {layout} of {name}, which does not fit the tensors of the file. "
                "The two belong to different adapters: take both from the original run again."
            )
    found, expected = count_layouts([*layers, *tied], config.lora_layouts), config.adapted_layers
    if expected is not None and found != dict(sorted(expected.items())):
        raise IncompleteAdapterError(
            f"The adapter file and lora_layouts in {CONFIG_NAME} give these layers by kind: {found}; the adapter was "
            f"saved with {expected}. One of the two was edited or damaged: take both from the original run again."
        )
    targets: set[str] = config.target_modules if isinstance(config.target_modules, set) else set()
    names = [base_name(name, config.lora_layouts.get(name), layers) for name in (*layers, *tied)]
    absent = sorted(target for target in targets if not any(f".{name}".endswith(f".{target}") for name in names))
    if absent and expected is None:  # written before layers were counted; PEFT lets a target match nothing
        logger.warning("The adapter file has no layer for %s of target_modules: is it whole?", ", ".join(absent))
