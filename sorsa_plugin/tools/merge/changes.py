"""What a saved adapter changes in a base model: which parameters, and by which of its tensors; reads no values."""

from __future__ import annotations

import warnings
from copy import deepcopy
from typing import NamedTuple

from transformers import PreTrainedModel

from ...config import SORSAConfig
from ...errors import IncompleteAdapterError, SORSAError
from ...files.adapter_format import ROOT
from ...files.time_limit import time_limit
from ...layers.kinds.tied import TiedLayer
from ...layers.layer import SORSALayer
from ...tuner.model import SORSAModel
from ..empty_adapter import ADAPTER, adapt_empty
from ..trained_tokens import TRAINED_TOKENS, trained_tokens

INJECTION = 600.0
"""Seconds in which PEFT has found the layers of any model: large ones take a few."""


class Change(NamedTuple):
    """How one parameter gets its merged value: it or rows of it are replaced, then a layer merges into it."""

    layer: SORSALayer | None = None
    """A layer without values, which merges into the parameter."""
    factors: str = ""
    """The beginning of the names of the layer's tensors in the file."""
    whole: str | None = None
    """The tensor in the file that replaces the parameter."""
    rows: str | None = None
    """The tensor in the file whose rows replace the rows in `tokens`."""
    tokens: tuple[int, ...] = ()


def find_changes(
    model: PreTrainedModel, config: SORSAConfig, layers: list[str], carried: list[str]
) -> dict[str, Change]:
    """{parameter: its change}.

    Args:
        model: the base model on the meta device. It gets the adapter's layers.
        config: the adapter's.
        layers: the layers that the file has factors of, under their names there.
        carried: the other tensors of the file.

    Raises:
        IncompleteAdapterError: file and config contradict each other.
    """
    tokens = _trained_tokens(model, config, carried)
    changes = {}
    adapted = _empty_layers(model, config, layers)
    files_name = {id(layer): name for name, layer in adapted.items()}
    for layer in adapted.values():
        owner = layer.source if isinstance(layer, TiedLayer) else layer
        changes[layer.parameter_path] = Change(owner, f"{ROOT}{files_name[id(owner)]}.sorsa_factors.")
    for name in carried:
        parameter = name.removeprefix(ROOT).replace(".base_layer.", ".").replace(".modules_to_save.", ".")
        if ".original_module." in parameter or name.endswith(TRAINED_TOKENS):
            continue
        change = changes.get(parameter, Change())
        changes[parameter] = change._replace(whole=change.whole or name)
    for parameter, change in tokens.items():
        changes[parameter] = changes.get(parameter, Change())._replace(rows=change.rows, tokens=change.tokens)
    return changes


def _empty_layers(model: PreTrainedModel, config: SORSAConfig, names: list[str]) -> dict[str, SORSALayer]:
    """The model's SORSA layers, without values, as PEFT would inject them, under their names in the file."""
    with warnings.catch_warnings(), time_limit("Finding the adapter's layers in the base model", INJECTION):
        # PEFT's advice about tied embeddings is for merging in memory
        warnings.filterwarnings("ignore", message=".*tie_word_embeddings|.*tied")
        try:
            SORSAModel(model, config, ADAPTER)
        except SORSAError:
            raise
        except (ValueError, TypeError) as error:
            raise IncompleteAdapterError(
                f"PEFT refuses the options in adapter_config.json for {type(model).__name__}: {error}. They belong to "
                "another adapter or base model: take both from the original run again."
            ) from error
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, SORSALayer)}
    own = [name for name, layer in layers.items() if not isinstance(layer, TiedLayer)]
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
            f"{type(model).__name__}. The two belong to different adapters: take both from the original run again."
        )
    return layers


def _trained_tokens(model: PreTrainedModel, config: SORSAConfig, carried: list[str]) -> dict[str, Change]:
    """{parameter: rows and tokens} of `trainable_token_indices`; PEFT says which modules they belong to."""
    if not config.trainable_token_indices:
        return {}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*tie_word_embeddings|.*tied")
        adapted = adapt_empty(deepcopy(model), config).get_base_model()
    found = {}
    for name, (owner, tokens) in trained_tokens(adapted).items():
        rows = f"{ROOT}{owner}{TRAINED_TOKENS}"
        if rows not in carried:
            raise IncompleteAdapterError(
                f"The adapter file has no {rows}, which trainable_token_indices in its adapter_config.json announces. "
                "The two belong to different adapters: take both from the original run again."
            )
        found[f"{name}.weight"] = Change(rows=rows, tokens=tokens)
    return found
