"""Writes a quantised residual model and its untrained adapter for a base model's files: the start of QSORSA.

The base is quantised while it is loaded. Its residuals are made from the files one weight at a time, so memory holds
the quantised model and a few fp32 matrices.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass
from importlib.util import find_spec
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from transformers import BitsAndBytesConfig

from ..config import SORSAConfig
from ..errors import MissingPackageError, SORSAConfigError, SORSAError
from ..files.atomic_directory import appearing_whole, output_path, refuse_occupied
from ..files.base_checkpoint import BaseFiles, class_for, local_directory
from ..files.checkpoint_copy import copy_other_files
from ..layers.layer import sorsa_layers
from .residual import quantize_residual
from .save_residual import FOLDER, write_residual

FORMATS: dict[str, dict[str, Any]] = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4", "bnb_4bit_use_double_quant": True},
    "int8": {"load_in_8bit": True},
}
"""bitsandbytes' formats: nf4 and fp4 as QLoRA sets them (double quantisation), int8 as LLM.int8()."""


@dataclass(frozen=True)
class ResidualReport:
    """What `init_residual` wrote."""

    output: Path
    layers: tuple[str, ...]
    rounding: tuple[float, float]
    """Mean relative error of the weights: with plain quantisation, and with residual and triplets together."""
    trainable_parameters: int
    bytes: int
    """Size of the model's and the adapter's weight files."""

    @property
    def adapter(self) -> Path:
        """The adapter's directory."""
        return self.output / FOLDER


def init_residual(
    base: str | PathLike[str],
    output_dir: str | PathLike[str],
    config: SORSAConfig,
    *,
    quantize: str = "nf4",
    dtype: torch.dtype | None = None,
    revision: str | None = None,
) -> ResidualReport:
    """Write what `quantize_residual` makes of a base, as `save_residual` does, and the base's other files (tokenizer).

    `PeftModel.from_pretrained(AutoModel....from_pretrained(output_dir), output_dir + "/adapter", is_trainable=True)`
    then trains without any factorisation. The output appears complete or not at all. After an interruption, the work
    begins anew.

    Args:
        base: directory of a full-precision model with safetensors files, or an id on the hub.
        output_dir: directory to make; it may exist and be empty.
        config: the adapter's options; task_type says what kind of model it is for.
        quantize: "nf4", "fp4" or "int8", by bitsandbytes.
        dtype: of the parameters that are not quantised; None for the base's own.
        revision: of the base, on the hub.

    Raises:
        MissingPackageError: bitsandbytes is not installed.
        BaseFilesError: the base cannot be read tensor by tensor.
        OutputExistsError: the output exists and is not an empty directory.
        SORSAConfigError: PEFT refuses the options for this model, the format is unknown, or the config is that of a
            saved adapter.
        BaseMismatchError: a targeted module is not quantised.
    """
    if quantize not in FORMATS:
        raise SORSAConfigError(f"quantize is {quantize!r}; expected one of {', '.join(map(repr, FORMATS))}.")
    if find_spec("bitsandbytes") is None:
        raise MissingPackageError(
            f"bitsandbytes is not installed; {quantize} needs it. Run: pip install 'sorsa-plugin[bitsandbytes]'"
        )
    if config.factors_from_file:
        raise SORSAConfigError(
            "The config is that of a saved adapter; expected the options of a new one. Make one with SORSAConfig(...)."
        )
    output = output_path(output_dir)
    refuse_occupied(output)
    files = BaseFiles(local_directory(base, revision, patterns=None))
    empty = files.empty_model(config.task_type, dtype)  # refuses a base that is damaged or of another task
    model = class_for(files.config, config.task_type).from_pretrained(
        str(base), revision=revision, quantization_config=BitsAndBytesConfig(**FORMATS[quantize]), dtype=empty.dtype
    )
    config = deepcopy(config)
    config.revision = revision or config.revision
    try:
        adapted = quantize_residual(model, config)
    except SORSAError:
        raise
    except ValueError as error:
        raise SORSAConfigError(f"PEFT refuses these options for {type(model).__name__}: {error}") from error
    with appearing_whole(output) as directory:
        copy_other_files(files, directory)
        write_residual(adapted, directory, output)
        size = sum(path.stat().st_size for path in directory.rglob("*.safetensors"))
    layers = sorsa_layers(adapted)
    made = [layer.rounding for layer in layers if layer.rounding is not None]
    plain, residual = (sum(errors) / len(made) for errors in zip(*made, strict=True))
    trainable = adapted.get_nb_trainable_parameters()[0]
    return ResidualReport(output, tuple(layer.name for layer in layers), (plain, residual), trainable, size)
