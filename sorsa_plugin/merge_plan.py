"""Which stored tensors a merge writes anew, and what becomes of weights that are tied; reads no weight of the base."""

from __future__ import annotations

from collections.abc import Callable
from copy import copy, deepcopy
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from .adapter_files import ROOT
from .base_files import empty_model
from .errors import BaseFilesError
from .layers.linear import PLAIN_DTYPES
from .stored_weights import StoredWeights

IN_MEMORY = (
    "Merge in memory instead: PeftModel.from_pretrained(base, adapter).merge_and_unload().save_pretrained(directory)."
)


def whole_parameters(carried: list[str]) -> dict[str, str]:
    """{parameter: its name in the adapter file} of what the file holds in whole, under the names PEFT saves it by."""
    parameters: dict[str, str] = {}
    for name in carried:
        parameter = name.removeprefix(ROOT).replace(".base_layer.", ".").replace(".modules_to_save.", ".")
        if ".original_module." not in parameter:
            parameters.setdefault(parameter, name)
    return parameters


@dataclass(frozen=True)
class MergePlan:
    """Which tensors of the merged model are not the base's."""

    values: dict[str, Callable[[], torch.Tensor]]
    """{stored or added name: makes the tensor}."""
    added: dict[str, str]
    """{parameter that gets a tensor of its own: name of the stored tensor it was tied to}."""
    untied: list[str]


def plan_merge(
    stored: StoredWeights,
    adapted: list[str],
    whole: dict[str, str],
    tensors: Any,
    make: Callable[[str], torch.Tensor],
) -> MergePlan:
    """Which tensors to write anew, each found exactly once.

    Args:
        stored: the base's tensors.
        adapted: parameters that a SORSA layer changes.
        whole: {parameter: name in the adapter file} of those that the adapter holds in whole.
        tensors: the adapter file.
        make: makes the new tensor of a parameter.
    """
    plan = MergePlan({}, {}, [])
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


def refuse_what_stays_tied(stored: StoredWeights, plan: MergePlan) -> None:
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
