"""Writes an untrained, complete adapter for a base model's files, one weight at a time; never holds the model.

Training then starts at once, even where weights cannot be factorised: sharded, offloaded, or on a small machine.
"""

from __future__ import annotations

import hashlib
import json
import logging
from copy import deepcopy
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import PeftModel, get_peft_model_state_dict
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from torch import nn
from tqdm.auto import tqdm

from ..config import SORSAConfig
from ..errors import SORSAConfigError
from ..files.adapter_format import FROZEN, ROOT
from ..files.atomic_directory import appearing_whole, output_path, refuse_occupied
from ..files.base_checkpoint import BaseFiles
from ..files.json_values import json_values
from ..files.safetensors_writer import TensorFile
from ..files.stored_parameters import StoredWeights
from ..layers.layer import SORSALayer
from ..linalg.fingerprint import fingerprint
from ..tuner.initialise import initialise
from .empty_adapter import ADAPTER, adapt_empty
from .trained_tokens import TRAINED_TOKENS, trained_tokens

logger = logging.getLogger(__name__)

UNFINISHED, FINISHED_LAYERS = "tensors.unfinished", "layers.finished"


@dataclass(frozen=True)
class InitReport:
    """What `init_adapter` wrote."""

    output: Path
    layers: tuple[str, ...]
    resumed: int
    """Layers whose factors an earlier, interrupted run had written."""
    trainable_parameters: int
    bytes: int
    """Size of adapter_model.safetensors."""


def init_adapter(
    base: str | PathLike[str],
    output_dir: str | PathLike[str],
    config: SORSAConfig,
    *,
    dtype: torch.dtype | None = None,
    revision: str | None = None,
    progress: bool = True,
) -> InitReport:
    """Write the adapter that get_peft_model(base, config) would start from.

    `PeftModel.from_pretrained(base, output_dir, is_trainable=True)` then trains without any factorisation, bit-equal to
    get_peft_model on the same base. Each weight is read from its shard, factorised (on the accelerator, if there is
    one), written and released.

    After an interruption, the same call continues where it stopped. A finished layer is redone if its weight has
    changed since.

    Args:
        base: directory of a model with safetensors files, or an id on the hub.
        output_dir: directory to make; it may exist and be empty.
        config: the adapter's options; task_type says what kind of model it is for.
        dtype: the dtype in which the base will be loaded; None for its own, as from_pretrained chooses it.
        revision: of the base, on the hub.
        progress: show a progress bar.

    Raises:
        BaseFilesError: the base cannot be read tensor by tensor.
        OutputExistsError: the output exists and is not an empty directory, or another process is writing it.
        SORSAConfigError: PEFT refuses the options for this model, or they are not those of a new adapter.
        RankError, UnsupportedLayerError, DecompositionError: as for get_peft_model.
    """
    output = output_path(output_dir)
    refuse_occupied(output)
    if config.factors_from_file or not config.init_weights:
        raise SORSAConfigError(
            "The config is that of a saved adapter, or says init_weights=False; expected the options of a new adapter. "
            "Make one with SORSAConfig(...)."
        )
    files = BaseFiles(base, revision)
    empty = files.empty_model(config.task_type, dtype)
    weights = StoredWeights(files, empty)
    model = adapt_empty(empty, config, revision)
    config = model.peft_config[ADAPTER]
    layout = get_peft_model_state_dict(model, adapter_name=ADAPTER)
    layers = _layers(model)
    carried = _carried(model, layout)
    for parameter in [*(entry.parameter for entry in carried), *(layer.parameter_path for layer in layers.values())]:
        weights.sources(parameter)  # raises now rather than after hours
    with appearing_whole(output, kept_as=_key(files, config, layout)) as directory:
        _reopen(directory, layers)
        size, resumed = _write_tensors(directory, layout, layers, carried, weights, progress)
        _complete(directory, model, config)
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    return InitReport(output, tuple(layer.name for layer in layers.values()), resumed, trainable, size)


def _layers(model: PeftModel) -> dict[str, SORSALayer]:
    """The layers with factors of their own, under their names in the file."""
    modules = model.get_base_model().named_modules()
    return {name: layer for name, layer in modules if isinstance(layer, SORSALayer) and ADAPTER in layer.sorsa_factors}


class Carried(NamedTuple):
    """A tensor of the adapter that belongs to no layer: a parameter of the base, or rows of it."""

    name: str
    parameter: str
    rows: tuple[int, ...] | None = None


def _carried(model: PeftModel, layout: dict[str, Any]) -> list[Carried]:
    """modules_to_save, embeddings that PEFT saves with an adapter, and trained tokens."""
    trained = trained_tokens(model.get_base_model())
    rows = {f"{ROOT}{name}{TRAINED_TOKENS}": (f"{name}.weight", tokens) for name, (_, tokens) in trained.items()}
    names = [name for name in layout if ".sorsa_factors." not in name]
    return [Carried(name, *rows.get(name, (name.removeprefix(ROOT).replace(".base_layer.", "."),))) for name in names]


def _write_tensors(
    directory: Path,
    layout: dict[str, Any],
    layers: dict[str, SORSALayer],
    carried: list[Carried],
    weights: StoredWeights,
    progress: bool,
) -> tuple[int, int]:
    """Write all tensors. Returns the size of the file, and the number of layers that an earlier run had finished."""
    with TensorFile(directory / UNFINISHED, layout) as file:
        resumed = _write_factors(file, layers, weights, directory / FINISHED_LAYERS, progress)
        for name, parameter, rows in carried:
            value = weights.read(parameter)
            file.write(name, (value if rows is None else value[list(rows)]).to(layout[name].dtype))
        file.flush()
    return (directory / UNFINISHED).stat().st_size, resumed


def _write_factors(
    file: TensorFile, layers: dict[str, SORSALayer], weights: StoredWeights, journal: Path, progress: bool
) -> int:
    """Factorise the layers that the journal does not name. Returns the number of named layers that still fit."""
    text = journal.read_text(encoding="utf-8") if journal.exists() else ""
    whole = text[: text.rfind("\n") + 1]  # drops a name that was cut off at the end
    finished = set(filter(None, whole.split("\n")))
    if finished:
        logger.warning("Continuing an interrupted run: %d of %d layers are done.", len(finished), len(layers))
    resumed = 0
    with journal.open("a", encoding="utf-8") as log:
        for name, layer in tqdm(layers.items(), desc="SORSA: singular triplets", unit="layer", disable=not progress):
            prefix = f"{ROOT}{name}.sorsa_factors."
            _fill(layer, weights)
            now = fingerprint(layer.base_matrix())
            if layer.name in finished and torch.equal(file.read(prefix + "fingerprint"), now):
                resumed += 1
            else:
                layer.factors(ADAPTER).to_empty(device="cpu")
                initialise(layer, ADAPTER)
                for part in FROZEN:
                    file.write(prefix + part, getattr(layer.factors(ADAPTER), part))
                file.flush()  # before the journal names the layer
                log.write(f"\n{layer.name}\n")
                log.flush()
            _empty(layer)
    return resumed


def _fill(layer: SORSALayer, weights: StoredWeights) -> None:
    """Read the parameter that a layer on the meta device adapts into its base module."""
    value = nn.Parameter(weights.read(layer.parameter_path), requires_grad=False)
    setattr(layer.get_base_layer(), layer.parameter_name, value)


def _empty(layer: SORSALayer) -> None:
    """Put everything of a layer back on the meta device."""
    layer.get_base_layer().to("meta")
    layer.factors(ADAPTER).to_empty(device="meta")


def _complete(directory: Path, model: PeftModel, config: SORSAConfig) -> None:
    """Write everything but the tensors, as PeftModel.save_pretrained does. Then give the tensors their final name."""
    model.create_or_update_model_card(str(directory))
    saved = deepcopy(config)
    saved.inference_mode = True
    base_class = type(model.get_base_model())
    mapping = {"base_model_class": base_class.__name__, "parent_library": base_class.__module__}
    saved.save_pretrained(str(directory), auto_mapping_dict=None if config.task_type else mapping)
    (directory / UNFINISHED).rename(directory / SAFETENSORS_WEIGHTS_NAME)
    (directory / FINISHED_LAYERS).unlink()


def _reopen(directory: Path, layers: dict[str, SORSALayer]) -> None:
    """Undo the last steps of a run that was killed during them."""
    whole = directory / SAFETENSORS_WEIGHTS_NAME
    if whole.exists():
        whole.rename(directory / UNFINISHED)
        names = "".join(f"{layer.name}\n" for layer in layers.values())
        (directory / FINISHED_LAYERS).write_text(names, encoding="utf-8")


def _key(files: BaseFiles, config: SORSAConfig, layout: dict[str, torch.Tensor]) -> str:
    """A name for the work: equal for equal options on an equal base, as far as the headers of its files tell."""
    tensors = [
        [(name, str(tensor.dtype), list(tensor.shape)) for name, tensor in sorted(group.items())]
        for group in (files.headers, layout)
    ]
    options = config.to_dict() | {"base_model_name_or_path": None}
    text = json.dumps(json_values([options, files.config.to_dict(), tensors]), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]
