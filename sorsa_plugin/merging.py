"""Merges a saved adapter into a base model's files, tensor by tensor; neither the model nor a shard is ever in memory.

Each adapted weight is lent to its own `SORSALayer`, on an otherwise empty model, and merged there: the arithmetic, the
order in which a kind stores its weight and the check of the fingerprint are those of `merge_and_unload`. Which stored
tensors are written anew is for `merge_plan.py` to say.
"""

from __future__ import annotations

import warnings
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import PreTrainedModel

from .adapter_files import ROOT, open_tensors, read_config, survey
from .base_files import BaseFiles, empty_model, local_directory
from .checkpoint_copy import copy_config, copy_other_files, copy_weights
from .config import SORSAConfig
from .empty_adapter import ADAPTER
from .errors import BaseFilesError, IncompleteAdapterError
from .factors import FROZEN, OFFSETS
from .layer import SORSALayer
from .merge_plan import IN_MEMORY, plan_merge, refuse_what_stays_tied, whole_parameters
from .model import SORSAModel
from .model_card import write_merged_card
from .outputs import appearing_whole, refuse_occupied
from .regularizer import sorsa_layers
from .stored_weights import StoredWeights


@dataclass(frozen=True)
class MergeReport:
    """What a merge wrote."""

    output: Path
    merged: tuple[str, ...]
    """Layers whose weights took a change."""
    replaced: tuple[str, ...]
    """Tensors that the adapter holds in whole (modules_to_save, embeddings) and that took the place of the base's."""
    untied: tuple[str, ...]
    """Tensors that were tied to one another before, and have values of their own now."""
    left_out: tuple[str, ...]
    """Files of the base that were not copied: the unmerged weights in other formats."""
    shards: int
    bytes: int
    """Size of all tensors."""


def merge_adapter(
    base: str | PathLike[str],
    adapter_dir: str | PathLike[str],
    output_dir: str | PathLike[str],
    *,
    safe: bool = False,
    revision: str | None = None,
) -> MergeReport:
    """Write the base model with the adapter merged in: the same shards, names and dtypes, and all its other files.

    Computed in fp32 and rounded once to the stored dtype, on the CPU, holding one weight at a time. The output
    appears complete or not at all; the base's files are only read. Where the adapter changes one of two tied weights
    alone, as the adapted model does, both are written and the config says that they are not tied any more.

    Args:
        base: directory of the base model, or its id on the hub.
        adapter_dir: directory of the adapter's adapter_config.json and adapter_model.safetensors.
        output_dir: directory to make; it may exist and be empty.
        safe: look for NaN and infinity in every tensor that is written anew.
        revision: of the base, on the hub.

    Raises:
        ForeignAdapterError, IncompleteAdapterError: there is no adapter, it is one of another method, or damaged.
        BaseFilesError: the base cannot be read, or does not store an adapted weight as a tensor of its own.
        BaseMismatchError: the adapter was trained on another base model.
        OutputExistsError: the output exists and is not an empty directory.
    """
    source, output = Path(adapter_dir), Path(output_dir).resolve()
    config = read_config(source)
    refuse_occupied(output)
    files = BaseFiles(local_directory(base, revision, patterns=None))
    with open_tensors(source) as tensors:
        ranks, carried = survey(tensors, config)
        model = _model_with(files, config, list(ranks))
        stored = StoredWeights(files, model)
        whole = whole_parameters(carried)
        layers = _empty_layers(model, config, list(ranks))
        make = partial(_make, stored, layers, whole, tensors, safe)
        plan = plan_merge(stored, [f"{name}.weight" for name in layers], whole, tensors, make)
        if plan.untied:
            refuse_what_stays_tied(stored, plan)
        with appearing_whole(output) as directory:
            size = copy_weights(files, directory, plan.values, plan.added)
            left_out = copy_other_files(files, directory)
            write_merged_card(files.directory, directory, config)
            copy_config(files, directory, untied=bool(plan.untied))  # last: without it there is no model
    return MergeReport(
        output, tuple(layers), tuple(whole), tuple(plan.untied), tuple(left_out), len(files.shards), size
    )


# -- which model -----------------------------------------------------------------------------------------------------


def _model_with(files: BaseFiles, config: SORSAConfig, layers: list[str]) -> PreTrainedModel:
    """The empty model whose modules bear the adapter's names: a base can be loaded with several classes.

    Raises:
        BaseFilesError: none of them does.
    """
    trained_class = (config.auto_mapping or {}).get("base_model_class")
    candidates = [(files.config, config.task_type)] if config.task_type else []
    if trained_class and hasattr(transformers, trained_class):
        named = deepcopy(files.config)
        named.architectures = [trained_class]
        candidates.insert(0, (named, None))
    absent = ""
    for model_config, task_type in (*candidates, (files.config, None)):
        try:
            model = empty_model(model_config, task_type)
        except BaseFilesError:
            if model_config is files.config and task_type is None:
                raise
            continue
        modules = dict(model.named_modules())
        absent = next((name for name in layers if name not in modules), "")
        if not absent:
            return model
    raise BaseFilesError(
        f"The adapter has factors of {absent}, a module that the model in {files.directory} does not have. Give the "
        f"base model that the adapter was trained on. If it is this one, loaded in a special way: {IN_MEMORY}"
    )


def _empty_layers(model: PreTrainedModel, config: SORSAConfig, names: list[str]) -> dict[str, SORSALayer]:
    """The model's SORSA layers, without values, by name, as PEFT would inject them."""
    with warnings.catch_warnings():
        # PEFT's advice about tied embeddings is for merging in memory
        warnings.filterwarnings("ignore", message=".*tie_word_embeddings")
        layers = {layer.name: layer for layer in sorsa_layers(SORSAModel(model, config, ADAPTER))}
    absent = [name for name in layers if name not in names]
    if absent:
        raise IncompleteAdapterError(
            f"The adapter file has no tensors for {len(absent)} of the {len(layers)} adapted layers, the first of them "
            f"{absent[0]}. It is truncated, or its adapter_config.json belongs to another file."
        )
    return {name: layers[name] for name in names}


# -- their values ----------------------------------------------------------------------------------------------------


def _make(
    stored: StoredWeights,
    layers: dict[str, SORSALayer],
    whole: dict[str, str],
    tensors: Any,
    safe: bool,
    parameter: str,
) -> torch.Tensor:
    """The new tensor of a parameter, in the dtype it is stored in."""
    value = stored.files.tensor(stored.key(parameter))
    if parameter in whole:
        value = tensors.get_tensor(whole[parameter]).to(value.dtype)
    layer = layers.get(parameter.removesuffix(".weight"))
    if layer is not None:
        prefix = f"{ROOT}{layer.name}.sorsa_factors."
        value = _merged(layer, value, {name: tensors.get_tensor(prefix + name) for name in (*OFFSETS, *FROZEN)})
    if safe and not value.isfinite().all():
        raise IncompleteAdapterError(
            f"{parameter} would hold NaN or infinity after merging, in {value.dtype}. Its base weight holds some, the "
            "training run diverged, or the sum leaves the range of the dtype: check both, or merge a base in bf16."
        )
    return value


def _merged(layer: SORSALayer, weight: torch.Tensor, factors: dict[str, torch.Tensor]) -> torch.Tensor:
    """The weight with the change of the factors added, by an empty layer, which is used up."""
    if not all(tensor.isfinite().all() for tensor in factors.values()):
        raise IncompleteAdapterError(
            f"The factors of {layer.name} hold NaN or infinity; expected finite numbers. The training run diverged or "
            "the file was damaged: merge an earlier checkpoint."
        )
    base = layer.get_base_layer()
    base.weight = nn.Parameter(weight, requires_grad=False)
    layer.factors(ADAPTER).load_state_dict(factors)
    layer.merge(adapter_names=[ADAPTER])
    merged = base.weight.data
    layer.unmerge()
    base.weight = None  # freed, not moved to the meta device: what is allocated here and stays would pin freed memory
    layer.sorsa_factors.clear()
    return merged
