"""Writes a model that stores residuals, and its adapter, as directories that transformers and PEFT load."""

from __future__ import annotations

import json
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import FoldError
from ..files.atomic_directory import appearing_whole, output_path, refuse_occupied
from ..layers.layer import sorsa_layers
from ..layers.unwrapped import without_adapters

if TYPE_CHECKING:
    from peft import PeftModel

FOLDER = "adapter"
"""Folder of the adapter in the directory that `save_residual` writes."""


def save_residual(model: PeftModel, directory: str | PathLike[str], adapter_name: str = "default") -> Path:
    """Write the quantised residual model, which transformers loads, with its adapter in its folder `adapter`.

    Load both with `PeftModel.from_pretrained(AutoModel....from_pretrained(directory), directory + "/adapter")`. The
    output appears complete or not at all.

    Args:
        model: a PEFT model whose base is a transformers model that stores residuals.
        directory: to make; it may exist and be empty.
        adapter_name: which adapter.

    Returns:
        The directory, as an absolute path.

    Raises:
        FoldError: the base stores no residuals, or an adapter is merged into it.
        OutputExistsError: the directory exists and is not empty.
    """
    output = output_path(directory)
    layers = sorsa_layers(model)
    if not layers or any(not layer.weight_state.is_residual or layer.merged for layer in layers):
        raise FoldError(
            "The base model stores no quantised residuals now, so there are none to save. Make them with "
            "quantize_residual() or residual_base=True, and unmerge adapters first."
        )
    refuse_occupied(output)
    with appearing_whole(output) as partial:
        write_residual(model, partial, output, adapter_name)
    return output


def write_residual(model: PeftModel, directory: Path, name: Path, adapter_name: str = "default") -> None:
    """Write the quantised residual model and its adapter into `directory`, which will later be renamed to `name`."""
    base: Any = model.base_model.model
    with without_adapters(base):
        base.save_pretrained(directory)
    model.save_pretrained(str(directory / FOLDER), selected_adapters=[adapter_name])
    folder = directory / FOLDER if adapter_name == "default" else directory / FOLDER / adapter_name
    path = folder / "adapter_config.json"
    options = json.loads(path.read_text(encoding="utf-8")) | {"base_model_name_or_path": str(name)}
    path.write_text(json.dumps(options, indent=2, sort_keys=True), encoding="utf-8")
