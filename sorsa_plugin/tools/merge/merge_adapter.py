"""Merges saved adapters into a base model's files, tensor by tensor; never holds the model or a shard in memory.

`changes.py` says what the adapters change, `values.py` computes the new values, and `plan.py` says which stored tensors
are written anew.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from copy import deepcopy
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

import transformers
from transformers import PreTrainedModel

from ...errors import BaseFilesError, MergeError
from ...files.adapter_format import outer_name
from ...files.atomic_directory import appearing_whole, output_path, refuse_occupied
from ...files.base_checkpoint import BaseFiles, empty_model, local_directory
from ...files.checkpoint_copy import copy_config, copy_other_files, copy_weights
from ...files.saved_adapter import open_tensors, read_config
from ...files.stored_parameters import StoredWeights
from ...model_card import write_merged_card
from ..empty_adapter import ADAPTER
from .changes import Adapters, OpenAdapter, find_changes
from .plan import IN_MEMORY, plan_merge, refuse_what_stays_tied
from .values import MergedWeights


@dataclass(frozen=True)
class MergeReport:
    """What a merge wrote."""

    output: Path
    merged: tuple[str, ...]
    """Layers whose weights took a change."""
    replaced: tuple[str, ...]
    """Tensors that the adapter holds as a whole (modules_to_save, embeddings) and that replaced the base's."""
    with_trained_tokens: tuple[str, ...]
    """Tensors of which rows were replaced (trainable_token_indices)."""
    untied: tuple[str, ...]
    """Tensors that were tied to one another before, and now have values of their own."""
    left_out: tuple[str, ...]
    """Files of the base that were not copied: the unmerged weights in other formats."""
    shards: int
    bytes: int
    """Size of all tensors."""


def merge_adapter(
    base: str | PathLike[str],
    adapter_dir: str | PathLike[str] | Sequence[str | PathLike[str]],
    output_dir: str | PathLike[str],
    *,
    safe: bool = False,
    revision: str | None = None,
) -> MergeReport:
    """Write the base model with the adapter merged in: the same shards, names and dtypes, and all its other files.

    Computed on the CPU in fp32 and rounded once to the stored dtype, holding one weight at a time. The output appears
    complete or not at all. The base's files are only read.

    If the adapter changes only one of two tied weights, both are written, and the config says that they are not tied
    any more. So it is in the adapted model.

    Args:
        base: directory of the base model, or its id on the hub.
        adapter_dir: directory of the adapter's adapter_config.json and adapter_model.safetensors; of several, a list.
            Each is checked against the base's weight, which gets the sum of their changes.
        output_dir: directory to make; it may exist and be empty.
        safe: look for NaN and infinity in every tensor that is written anew.
        revision: of the base, on the hub.

    Raises:
        ForeignAdapterError: there is no adapter, or it is of another method.
        IncompleteAdapterError: its files are damaged, or hold NaN or infinity.
        BaseFilesError: the base cannot be read, or does not store an adapted weight as a tensor of its own.
        BaseMismatchError: an adapter was trained on another base model.
        MergeError: the adapters cannot be merged together.
        OutputExistsError: the output exists and is not an empty directory.
    """
    output = output_path(output_dir)
    sources = [adapter_dir] if isinstance(adapter_dir, (str, PathLike)) else adapter_dir
    if not sources:
        raise MergeError("The list of adapters is empty; expected one directory at least.")
    for source in sources:
        read_config(Path(source))
    refuse_occupied(output)
    files = BaseFiles(local_directory(base, revision, patterns=None))
    with ExitStack() as opened:
        adapters = {
            ADAPTER if number == 0 else f"{ADAPTER}_{number}": OpenAdapter.of(
                Path(source), opened.enter_context(open_tensors(Path(source)))
            )
            for number, source in enumerate(sources)
        }
        model = _model_with(files, adapters)
        stored = StoredWeights(files, model)
        changes = find_changes(model, adapters)
        plan = plan_merge(MergedWeights(stored, changes, adapters, safe))
        if plan.untied:
            refuse_what_stays_tied(stored, plan)
        with appearing_whole(output) as directory:
            size = copy_weights(files, directory, plan.values, plan.added)
            left_out = copy_other_files(files, directory)
            cards = [adapter.config.card_values() for adapter in adapters.values()]
            write_merged_card(files.directory, directory, cards)
            copy_config(files, directory, untied=bool(plan.untied))  # last: without it there is no model
    return MergeReport(
        output,
        merged=tuple(dict.fromkeys(change.layer.name for change in changes.values() if change.layer is not None)),
        replaced=tuple(name for name, change in changes.items() if change.whole is not None),
        with_trained_tokens=tuple(name for name, change in changes.items() if change.rows is not None),
        untied=tuple(plan.untied),
        left_out=tuple(left_out),
        shards=len(files.shards),
        bytes=size,
    )


# -- which model -----------------------------------------------------------------------------------------------------


def _model_with(files: BaseFiles, adapters: Adapters) -> PreTrainedModel:
    """The empty model whose modules have the adapters' names: a base can be loaded with several classes.

    Raises:
        BaseFilesError: no class gives such a model.
    """
    config = adapters[ADAPTER].config
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
        absent = next(
            (
                name
                for adapter in adapters.values()
                for name in adapter.layers
                if outer_name(name, adapter.layers) not in modules
            ),
            "",
        )
        if not absent:
            return model
    raise BaseFilesError(
        f"The adapter has factors of {absent}, a module that the model in {files.directory} does not have. Give the "
        f"base model that the adapter was trained on. If it is this one, loaded in a special way: {IN_MEMORY}"
    )
