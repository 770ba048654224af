"""What saved adapters change in a base model: which parameters, and by which of their tensors."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel

from ...config import SORSAConfig
from ...errors import IncompleteAdapterError, MergeError, SORSAError
from ...files.adapter_format import ROOT
from ...files.saved_adapter import read_config, survey
from ...files.time_limit import time_limit
from ...layers.kinds.tied import TiedLayer
from ...layers.layer import SORSALayer
from ...tuner.model import SORSAModel
from ..empty_adapter import ADAPTER, adapt_empty
from ..trained_tokens import TRAINED_TOKENS, trained_tokens

INJECTION = 600.0
"""Seconds in which PEFT has found the layers of any model: large ones take a few."""


class OpenAdapter(NamedTuple):
    """A saved adapter whose file is open."""

    config: SORSAConfig
    tensors: Any
    """The safetensors file."""
    layers: list[str]
    """The layers that the file has factors of, under their names there."""
    carried: list[str]
    """The other tensors of the file."""

    @classmethod
    def of(cls, source: Path, tensors: Any) -> OpenAdapter:
        """The adapter in a directory, its file opened by `open_tensors`.

        Raises:
            ForeignAdapterError, IncompleteAdapterError: see `survey`.
        """
        config = read_config(source)
        ranks, carried = survey(tensors, config)
        return cls(config, tensors, list(ranks), carried)


Adapters = Mapping[str, OpenAdapter]
"""{a name for each adapter: the adapter}"""

Stored = tuple[str, str]
"""An adapter's name in `Adapters`, and a tensor's, or the beginning of tensors' names, in its file."""


class Change(NamedTuple):
    """How one parameter gets its merged value: it or rows of it are replaced, then a layer merges into it."""

    layer: SORSALayer | None = None
    """A layer without values, which merges into the parameter."""
    factors: tuple[Stored, ...] = ()
    """Where the layer's tensors are; of each adapter that changes it."""
    whole: Stored | None = None
    """The tensor that replaces the parameter."""
    rows: Stored | None = None
    """The tensor whose rows replace the rows in `tokens`."""
    tokens: tuple[int, ...] = ()


def find_changes(model: PreTrainedModel, adapters: Adapters) -> dict[str, Change]:
    """{parameter: its change}.

    Args:
        model: the base model on the meta device. It gets the adapters' layers.
        adapters: those to merge.

    Raises:
        IncompleteAdapterError: file and config of an adapter contradict each other.
        MergeError: two adapters replace the same parameter, or one does and the other changes it; or PEFT cannot put
            the adapters on one model.
    """
    tokens = {name: _trained_tokens(model, name, adapter) for name, adapter in adapters.items()}
    adapted = _empty_layers(model, adapters)
    changes: dict[str, Change] = {}
    for name, adapter in adapters.items():
        for parameter, change in _changes_of(name, adapter, adapted, tokens[name]).items():
            known = changes.get(parameter)
            changes[parameter] = change if known is None else _together(parameter, known, change, adapters)
    return changes


def _changes_of(
    name: str, adapter: OpenAdapter, adapted: dict[str, SORSALayer], tokens: dict[str, Change]
) -> dict[str, Change]:
    """{parameter: its change} by one of the adapters."""
    changes: dict[str, Change] = {}
    files_name = {id(layer): path for path, layer in adapted.items()}
    for layer in adapted.values():
        if name in layer.configs:
            owner = layer.source if isinstance(layer, TiedLayer) else layer
            factors = ((name, f"{ROOT}{files_name[id(owner)]}.sorsa_factors."),)
            changes[layer.parameter_path] = Change(owner, factors)
    for tensor in adapter.carried:
        parameter = tensor.removeprefix(ROOT).replace(".base_layer.", ".").replace(".modules_to_save.", ".")
        if ".original_module." in parameter or tensor.endswith(TRAINED_TOKENS):
            continue
        change = changes.get(parameter, Change())
        changes[parameter] = change._replace(whole=change.whole or (name, tensor))
    for parameter, change in tokens.items():
        changes[parameter] = changes.get(parameter, Change())._replace(rows=change.rows, tokens=change.tokens)
    return changes


def _together(parameter: str, one: Change, other: Change, adapters: Adapters) -> Change:
    """The changes of two adapters: the sum of what their factors add. A tensor that both hold alike replaces once."""
    held = [adapters[name].tensors.get_tensor(tensor) for name, tensor in filter(None, (one.whole, other.whole))]
    alike = not held or (len(held) == 2 and torch.equal(*held))
    if one.rows or other.rows or not alike:
        raise MergeError(
            f"Two of the adapters give {parameter} a value, one of them in whole or in rows (modules_to_save, "
            "trainable_token_indices); expected changes that add up. Merge only one of them."
        )
    return one._replace(layer=one.layer or other.layer, factors=one.factors + other.factors)


def _empty_layers(model: PreTrainedModel, adapters: Adapters) -> dict[str, SORSALayer]:
    """The model's SORSA layers, without values, as PEFT would inject them, under their names in the files."""
    with warnings.catch_warnings(), time_limit("Finding the adapter's layers in the base model", INJECTION):
        # PEFT's advice about tied embeddings, and about several adapters, is for work in memory
        warnings.filterwarnings("ignore", message=".*tie_word_embeddings|.*tied|Already found a `peft_config`")
        for name, adapter in adapters.items():
            try:
                SORSAModel(model, adapter.config, name)
            except (ValueError, TypeError) as error:
                if name != ADAPTER:
                    raise MergeError(f"The adapters cannot be put on one model together: {error}") from error
                if isinstance(error, SORSAError):
                    raise
                raise IncompleteAdapterError(
                    f"PEFT refuses the options in adapter_config.json for {type(model).__name__}: {error}. They belong "
                    "to another adapter or base model: take both from the original run again."
                ) from error
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, SORSALayer)}
    for name, adapter in adapters.items():
        own = [path for path, layer in layers.items() if name in layer.sorsa_factors]
        _check_layers(own, adapter.layers, type(model).__name__)
    return layers


def _check_layers(own: list[str], names: list[str], model: str) -> None:
    """Raises IncompleteAdapterError if a file's layers are not those that its config selects."""
    absent = [name for name in own if name not in names]
    if absent:
        raise IncompleteAdapterError(
            f"The adapter file has no tensors for {len(absent)} of the {len(own)} adapted layers, the first of them "
            f"{absent[0]}. It is truncated, or its adapter_config.json belongs to another file."
        )
    foreign = [name for name in names if name not in own]
    if foreign:
        raise IncompleteAdapterError(
            f"The adapter file has factors of {foreign[0]}, which its adapter_config.json does not select in "
            f"{model}. The two belong to different adapters: take both from the original run again."
        )


def _trained_tokens(model: PreTrainedModel, adapter_name: str, adapter: OpenAdapter) -> dict[str, Change]:
    """{parameter: rows and tokens} of `trainable_token_indices`; PEFT says which modules they belong to."""
    config = adapter.config
    if not config.trainable_token_indices:
        return {}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*tie_word_embeddings|.*tied")
        adapted = adapt_empty(deepcopy(model), config).get_base_model()
    found = {}
    for name, (owner, tokens) in trained_tokens(adapted).items():
        rows = f"{ROOT}{owner}{TRAINED_TOKENS}"
        if rows not in adapter.carried:
            raise IncompleteAdapterError(
                f"The adapter file has no {rows}, which trainable_token_indices in its adapter_config.json announces. "
                "The two belong to different adapters: take both from the original run again."
            )
        found[f"{name}.weight"] = Change(rows=(adapter_name, rows), tokens=tokens)
    return found
