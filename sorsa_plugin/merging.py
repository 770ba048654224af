"""Merges a saved adapter into a base model's files, tensor by tensor; neither the model nor a shard is ever in memory.

Each adapted weight is lent to its own `SORSALayer`, on an otherwise empty model, and merged there: the arithmetic, the
order in which a kind stores its weight and the check of the fingerprint are those of `merge_and_unload`. Which stored
tensor is which parameter is for `stored_weights.py` to say.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from copy import copy, deepcopy
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
from .errors import BaseFilesError, IncompleteAdapterError
from .factors import FROZEN, OFFSETS
from .layer import SORSALayer
from .linear import PLAIN_DTYPES
from .model import SORSAModel
from .model_card import write_merged_card
from .outputs import appearing_whole, refuse_occupied
from .regularizer import sorsa_layers
from .stored_weights import StoredWeights

ADAPTER = "default"

IN_MEMORY = (
    "Merge in memory instead: PeftModel.from_pretrained(base, adapter).merge_and_unload().save_pretrained(directory)."
)


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
        whole = _whole_parameters(carried)
        layers = _empty_layers(model, config, list(ranks))
        make = partial(_make, stored, layers, whole, tensors, safe)
        plan = _plan(stored, [f"{name}.weight" for name in layers], whole, tensors, make)
        if plan.untied:
            _refuse_what_stays_tied(stored, plan)
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
    named = deepcopy(files.config)
    named.architectures = [trained_class]
    candidates = [(named, None)] if trained_class and hasattr(transformers, trained_class) else []
    candidates += [(files.config, config.task_type)] if config.task_type else []
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


# -- which tensors ---------------------------------------------------------------------------------------------------


def _whole_parameters(carried: list[str]) -> dict[str, str]:
    """{parameter: its name in the adapter file} of what the file holds in whole, under the names PEFT saves it by."""
    parameters: dict[str, str] = {}
    for name in carried:
        parameter = name.removeprefix(ROOT).replace(".base_layer.", ".").replace(".modules_to_save.", ".")
        if ".original_module." not in parameter:
            parameters.setdefault(parameter, name)
    return parameters


@dataclass(frozen=True)
class _Plan:
    values: dict[str, Callable[[], torch.Tensor]]
    """{stored or added name: makes the tensor}."""
    added: dict[str, str]
    """{parameter that gets a tensor of its own: name of the stored tensor it was tied to}."""
    untied: list[str]


def _plan(
    stored: StoredWeights,
    adapted: list[str],
    whole: dict[str, str],
    tensors: Any,
    make: Callable[[str], torch.Tensor],
) -> _Plan:
    """Which tensors to write anew, each found exactly once.

    Args:
        stored: the base's tensors.
        adapted: parameters that a SORSA layer changes.
        whole: {parameter: name in the adapter file} of those that the adapter holds in whole.
        tensors: the adapter file.
        make: makes the new tensor of a parameter.
    """
    plan = _Plan({}, {}, [])
    for parameter in dict.fromkeys((*adapted, *whole)):
        _check_stored(stored, parameter, whole.get(parameter), tensors)
        tied = _tied_together(stored, parameter)
        if parameter in plan.untied:
            continue
        if tied == [parameter] or _alike(tied, adapted, whole, tensors):
            plan.values[stored.key(parameter)] = partial(make, parameter)
            continue
        plan.untied.extend(tied)
        for member in tied:
            key = stored.key(member)
            if stored.stored_as(member) != member:
                plan.added[member] = key
                key = member
            if member in adapted or member in whole:
                plan.values[key] = partial(make, member)
    return plan


def _check_stored(stored: StoredWeights, parameter: str, carried: str | None, tensors: Any) -> None:
    try:
        key = stored.key(parameter)
    except BaseFilesError as error:
        raise BaseFilesError(f"{error} The adapter changes it, so it cannot be merged here. {IN_MEMORY}") from error
    header = stored.files.headers[key]
    if header.dtype not in PLAIN_DTYPES and parameter.endswith(".weight"):
        raise BaseFilesError(
            f"{key} is stored as {header.dtype}; expected fp32, bf16 or fp16. Give the unquantised base model."
        )
    shape = list(stored.parameters[parameter].shape) if carried is None else tensors.get_slice(carried).get_shape()
    if list(header.shape) != shape:
        raise BaseFilesError(
            f"{key} has shape {tuple(header.shape)} in the base model; the adapter needs {tuple(shape)}. If the "
            "vocabulary was resized for training, resize the base model likewise and save it, or give the base model "
            "that the adapter was trained on."
        )


def _tied_together(stored: StoredWeights, parameter: str) -> list[str]:
    """A parameter and all that are tied to it."""
    root = stored.tied.get(parameter, parameter)
    return sorted({parameter, root, *(target for target, source in stored.tied.items() if source == root)})


def _alike(tied: list[str], adapted: list[str], whole: dict[str, str], tensors: Any) -> bool:
    """Whether tied parameters have the same values still: all are replaced by the same ones."""
    if any(member in adapted or member not in whole for member in tied):
        return False
    first, *others = (tensors.get_tensor(whole[member]) for member in tied)
    return all(torch.equal(first, other) for other in others)


def _refuse_what_stays_tied(stored: StoredWeights, plan: _Plan) -> None:
    """Check that transformers will load the tensors that get values of their own as such.

    Not for encoder-decoders: some of them scale their output by whether embeddings are tied.
    """
    config = deepcopy(stored.model.config)
    config.tie_word_embeddings = config.get_text_config().tie_word_embeddings = False
    config.architectures = [type(stored.model).__name__]
    result = copy(stored.files)
    result.headers = stored.files.headers | {name: stored.files.headers[like] for name, like in plan.added.items()}
    loaded = StoredWeights(result, empty_model(config))
    for name in plan.untied:
        tied = name in (*loaded.tied, *loaded.tied.values()) or loaded.stored_as(name) != name
        if tied or config.is_encoder_decoder:
            raise BaseFilesError(
                f"The adapter gives {name} other values than the weights it is tied to, and a checkpoint of "
                f"{type(stored.model).__name__} cannot hold both. {IN_MEMORY}"
            )


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
