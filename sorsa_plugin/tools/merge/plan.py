"""Plans which stored tensors a merge writes anew, and what happens to tied weights; reads no weight of the base."""

from __future__ import annotations

from collections.abc import Callable
from copy import copy, deepcopy
from dataclasses import dataclass
from functools import partial

import torch

from ...errors import BaseFilesError
from ...files.base_checkpoint import empty_model
from ...files.stored_parameters import StoredWeights
from ...layers.storage import PLAIN_DTYPES
from .values import MergedWeights

IN_MEMORY = (
    "Merge in memory instead: PeftModel.from_pretrained(base, adapter).merge_and_unload().save_pretrained(directory)."
)


@dataclass(frozen=True)
class MergePlan:
    """Which tensors of the merged model differ from the base's."""

    values: dict[str, Callable[[], torch.Tensor]]
    """{stored or added name: function that makes the tensor, in the stored shape and dtype}"""
    added: dict[str, str]
    """{parameter that gets a tensor of its own: name of the stored tensor that it was tied to}"""
    untied: list[str]


def plan_merge(weights: MergedWeights) -> MergePlan:
    """Which tensors to write anew, each found exactly once.

    Raises:
        BaseFilesError: the base stores a changed parameter in a way in which it cannot be written again.
    """
    plan, stored = MergePlan({}, {}, []), weights.stored
    for parameter in weights.changes:
        _check_stored(weights, parameter)
        tied = _tied_together(stored, parameter)
        if parameter in plan.untied:
            continue
        if stored.made_together(parameter):
            _refuse_tied_conversions(stored, parameter, tied)
            plan.values.update({key: partial(weights.part, parameter, key) for key in stored.sources(parameter)})
            continue
        if weights.alike(tied):
            plan.values[stored.key(parameter)] = partial(weights.value, parameter)
            continue
        plan.untied.extend(tied)
        for member in tied:
            key = stored.key(member)
            if stored.stored_as(member) != member:
                plan.added[member] = key
                key = member
            if member in weights.changes:
                plan.values[key] = partial(weights.value, member)
    return plan


def _check_stored(weights: MergedWeights, parameter: str) -> None:
    stored, change = weights.stored, weights.changes[parameter]
    try:
        sources, together = stored.sources(parameter), stored.made_together(parameter)
        if together:
            stored.split(together)  # raises now rather than halfway
    except BaseFilesError as error:
        raise BaseFilesError(f"{error} The adapter changes it, so it cannot be merged here. {IN_MEMORY}") from error
    headers = {key: stored.files.headers[key] for key in sources}
    for key, header in headers.items():
        if header.dtype not in PLAIN_DTYPES and (change.layer or parameter.endswith(".weight")):
            raise BaseFilesError(
                f"{key} is stored as {header.dtype}; expected fp32, bf16 or fp16. Give the unquantised base model."
            )
    header = together[parameter] if together else headers[sources[0]]
    shape = list(stored.parameters[parameter].shape)
    if change.whole is not None:
        shape = weights.shape_of(change.whole)
    if list(header.shape) != shape:
        raise BaseFilesError(
            f"{sources[0]} has shape {tuple(header.shape)} in the base model; the adapter needs {tuple(shape)}. If the "
            "vocabulary was resized for training, resize the base model likewise and save it, or give the base model "
            "that the adapter was trained on."
        )


def _refuse_tied_conversions(stored: StoredWeights, parameter: str, tied: list[str]) -> None:
    if tied != [parameter]:
        raise BaseFilesError(
            f"{' and '.join(tied)} are tied, and transformers makes them from "
            f"{', '.join(stored.sources(parameter)[:3])}; expected one or the other. {IN_MEMORY}"
        )


def _tied_together(stored: StoredWeights, parameter: str) -> list[str]:
    """A parameter and all that are tied to it."""
    root = stored.tied.get(parameter, parameter)
    return sorted({parameter, root, *(target for target, source in stored.tied.items() if source == root)})


def refuse_what_stays_tied(stored: StoredWeights, plan: MergePlan) -> None:
    """Check that transformers will load the tensors that get values of their own as separate tensors.

    Encoder-decoder models are refused: some of them scale their output depending on whether embeddings are tied.

    Raises:
        BaseFilesError: transformers would tie one of them again, or the model is an encoder-decoder.
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
