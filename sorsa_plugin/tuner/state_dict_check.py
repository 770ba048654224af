"""Checks an adapter's state dict before any layer takes tensors from it.

PEFT alone would warn of missing or surplus tensors, and go on with a part of the adapter.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, MutableMapping
from typing import TYPE_CHECKING, Any

from ..errors import IncompleteAdapterError
from ..files.adapter_format import FROZEN, OFFSETS, plain_name

if TYPE_CHECKING:
    from ..layers.layer import SORSALayer

FACTOR = re.compile(r"(?P<layer>.+)\.sorsa_factors\.((?P<adapter>[^.]+)\.)?[^.]+")
"""A factor's name, including the adapter's name if PEFT has put it in."""


def take_wrappers_out(state_dict: MutableMapping[str, Any], prefix: str, layers: Mapping[str, SORSALayer]) -> None:
    """Rename factors that differ from a layer's by wrappers alone: they were saved from a compiled model, say.

    A name stays where no layer, or more than one, could be meant. `check_adapters` refuses it then.

    Args:
        state_dict: the one that PEFT or torch loads; changed in place.
        prefix: the beginning of the model's names in it.
        layers: the model's, by name.
    """
    found: dict[str, list[str]] = {}
    for key in list(state_dict):
        match = FACTOR.fullmatch(key, len(prefix)) if key.startswith(prefix) else None
        if match is not None:
            found.setdefault(match["layer"], []).append(key)
    free = {name: _bare(name) for name in layers if name not in found}
    strange = {name: _bare(name) for name in found if name not in layers}
    for name, bare in strange.items():
        meant = [layer for layer, other in free.items() if other == bare]
        if len(meant) == 1 and list(strange.values()).count(bare) == 1:
            for key in found[name]:
                end = _with_adapter(key[len(prefix) + len(name) :], layers[meant[0]])
                if end is not None:
                    state_dict[prefix + meant[0] + end] = state_dict.pop(key)


def _bare(name: str) -> str:
    """Without wrappers, and without the layers of PEFT's other methods that may lie around this one."""
    return ".".join(part for part in plain_name(name).split(".") if part != "base_layer")


def _with_adapter(end: str, layer: SORSALayer) -> str | None:
    """The end of a factor's name, ".sorsa_factors.dU", with the adapter's name where PEFT has not put it in.

    None if several adapters could be meant.
    """
    _, factors, *rest = end.split(".")
    if len(rest) == 2:
        return end
    waiting = [name for name in layer.sorsa_factors if layer.factors(name).pending] or list(layer.sorsa_factors)
    return f".{factors}.{waiting[0]}.{rest[0]}" if len(waiting) == 1 else None


def check_adapters(
    state_dict: Mapping[str, Any], prefix: str, layers: Mapping[str, SORSALayer], adapters: Iterable[str]
) -> None:
    """Check that the factors in a state dict are those of whole adapters. There may be none: then it is the base's.

    Args:
        state_dict: the one that PEFT or torch loads.
        prefix: the beginning of the model's names in it.
        layers: the model's, by name.
        adapters: the model's.

    Raises:
        IncompleteAdapterError: an adapter has factors for only some of its layers, for layers that are not its own, or
            of no use.
        BaseMismatchError: the adapter was made from other weights than the layers'.
    """
    adapters = list(adapters)
    weights = [key for key in state_dict if ".sorsa_factors." not in key]
    _refuse_strangers(state_dict, prefix, layers, adapters)
    for adapter in adapters:
        keys = {
            name: f"{prefix}{name}.sorsa_factors.{adapter}."
            for name, layer in layers.items()
            if adapter in layer.sorsa_factors
        }
        absent = [name for name, key in keys.items() if not any(key + part in state_dict for part in OFFSETS)]
        if absent and len(absent) < len(keys):
            raise IncompleteAdapterError(
                f"The adapter file has no tensors for {len(absent)} of the {len(keys)} adapted layers, the first "
                f"of them {absent[0]}. It is truncated, or its adapter_config.json belongs to another file."
            )
        present = [name for name, key in keys.items() if layers[name].factors(adapter).names_in(state_dict, key)]
        for name in present:
            if any(key.startswith(f"{prefix}{name}.base_layer.") for key in weights):
                continue  # the base weight is replaced as well: the two are compared afterwards
            layers[name].check_file(adapter, {part: state_dict[keys[name] + part] for part in FROZEN})


def _refuse_strangers(
    state_dict: Mapping[str, Any], prefix: str, layers: Mapping[str, SORSALayer], adapters: list[str]
) -> None:
    """Raises IncompleteAdapterError if there are factors that no layer takes.

    Depending on its version, PEFT leaves those without the adapter's name, or adds it.
    """
    taken: set[str] = set()
    strange: set[str] = set()
    for key in state_dict:
        match = FACTOR.fullmatch(key, len(prefix)) if key.startswith(prefix) else None
        if match is not None and match["adapter"] in (None, *adapters):
            layer = layers.get(match["layer"])
            known = layer is not None and match["adapter"] in layer.sorsa_factors
            (taken if known else strange).add(match["layer"])
    first = min(strange, default="").removeprefix("model.")
    bare = {_bare(name) for name in layers}
    if strange and all(name not in layers and _bare(name) in bare for name in strange):
        raise IncompleteAdapterError(
            f"The adapter file's names carry wrappers, such as {first}: it was saved from a compiled model, or from "
            "inside another method's layers, and it is not clear which of the model's adapters and layers are meant. "
            "Load it onto the plain model alone, and save it again."
        )
    if strange and not taken:
        raise IncompleteAdapterError(
            f"The adapter file has no tensors for any of the {len(layers)} adapted layers, but for {len(strange)} "
            f"others, the first of them {first}. It was saved with other target modules: load it with its own "
            "adapter_config.json, or resume with the options of the run that saved it."
        )
    if strange:
        raise IncompleteAdapterError(
            f"The adapter file has tensors for {len(strange)} layers that do not have the adapter, the first of "
            f"them {first}. Its adapter_config.json belongs to another file, or a load that was refused has left "
            "an adapter of this name: then delete_adapter() it first."
        )
