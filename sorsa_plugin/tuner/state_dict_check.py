"""What an adapter's state dict must have, and must not, before any layer takes tensors from it: PEFT would warn of what
is missing or left over, and go on with a part of the adapter."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from ..errors import IncompleteAdapterError
from ..files.adapter_format import OFFSETS

if TYPE_CHECKING:
    from ..layers.layer import SORSALayer

FACTOR = re.compile(r"(?P<layer>.+)\.sorsa_factors\.((?P<adapter>[^.]+)\.)?[^.]+")
"""A factor's name, with the adapter's where PEFT has put it in."""


def check_names(
    state_dict: Mapping[str, Any], prefix: str, layers: Mapping[str, SORSALayer], adapters: Iterable[str]
) -> None:
    """Nothing, where the factors in a state dict are those of whole adapters, or there are none: the base's.

    Args:
        state_dict: that PEFT or torch loads.
        prefix: of the model's names in it.
        layers: the model's, by name.
        adapters: the model's.

    Raises:
        IncompleteAdapterError: an adapter is there for some of its layers only, for others, or beside others.
    """
    adapters = list(adapters)
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
        for name, key in keys.items():
            layers[name].factors(adapter).names_in(state_dict, key)


def _refuse_strangers(
    state_dict: Mapping[str, Any], prefix: str, layers: Mapping[str, SORSALayer], adapters: list[str]
) -> None:
    """Raises IncompleteAdapterError where there are factors that no layer takes: PEFT leaves those without the
    adapter's name, or gives it to them, by its version."""
    taken: set[str] = set()
    strange: set[str] = set()
    for key in state_dict:
        match = FACTOR.fullmatch(key, len(prefix)) if key.startswith(prefix) else None
        if match is not None and match["adapter"] in (None, *adapters):
            layer = layers.get(match["layer"])
            known = layer is not None and match["adapter"] in layer.sorsa_factors
            (taken if known else strange).add(match["layer"])
    first = min(strange, default="").removeprefix("model.")
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
