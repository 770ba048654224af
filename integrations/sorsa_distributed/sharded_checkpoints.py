"""Makes one adapter of a checkpoint that processes wrote in pieces: FSDP2's shards, DeepSpeed ZeRO's partitions.

The libraries that wrote the pieces read them: `torch.distributed.checkpoint` and DeepSpeed's `zero_to_fp32`.
"""

from __future__ import annotations

import contextlib
import logging
import re
import sys
import tempfile
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import save_file

from sorsa_plugin.errors import ForeignAdapterError, IncompleteAdapterError, MissingPackageError, SORSAError
from sorsa_plugin.extend import (
    FROZEN,
    OFFSETS,
    appearing_whole,
    open_tensors,
    output_path,
    read_config,
    refuse_occupied,
    survey,
)

from .checked_metadata import require_tensors_alone

logger = logging.getLogger(__name__)

FSDP_SHARDS = "pytorch_model_fsdp_0"
"""The folder in which accelerate puts the shards of the model (`FSDP_MODEL_NAME` and its number)."""
DEEPSPEED_TAG = "latest"
"""The file that names the folder of DeepSpeed's partitions."""
NAMED = re.compile(r"\.(sorsa_factors|trainable_tokens_delta|modules_to_save)\.([^.]+)(?=\.|$)")
"""The place of the adapter's name in a model's state dict. An adapter file's names do not have it."""


@dataclass(frozen=True)
class Conversion:
    """What a conversion wrote."""

    output: Path
    written_by: str
    """FSDP2 or DeepSpeed."""
    layers: int
    bytes: int
    """Size of the tensors."""


def convert_checkpoint(
    checkpoint: str | PathLike[str],
    output_dir: str | PathLike[str],
    *,
    config: str | PathLike[str] | None = None,
    adapter_name: str = "default",
) -> Conversion:
    """Write the adapter of a sharded training checkpoint as PEFT's two files, which load on one process.

    The offsets are the optimizer's own, fp32. After DeepSpeed's bf16 training they are more exact than the adapter
    beside the partitions, which holds bf16 copies. DeepSpeed's partitions are pickles: convert only what you trust.

    Args:
        checkpoint: the checkpoint-N directory of a Trainer.
        output_dir: directory to make; it may exist and be empty.
        config: directory of the adapter's adapter_config.json; default: the checkpoint, or the directory that holds it.
        adapter_name: which adapter, if several were trained.

    Raises:
        ForeignAdapterError: there are no pieces, no adapter of this name in them, or no adapter_config.json.
        IncompleteAdapterError: pieces are absent or damaged, or the config belongs to another adapter.
        MissingPackageError: DeepSpeed wrote the checkpoint and is not installed here.
        OutputExistsError: the output exists and is not an empty directory.
    """
    source, output = Path(checkpoint), output_path(output_dir)
    written_by, read = _reader(source)
    options = read_config(_directory_of_config(source, config))
    refuse_occupied(output)
    try:
        state = read(source)
    except SORSAError:
        raise
    except (OSError, ValueError, KeyError, RuntimeError, EOFError) as error:
        raise IncompleteAdapterError(
            f"{source} cannot be read ({error!r}); expected every piece that {written_by} wrote. Copy the directory "
            "from the original run again, or take an earlier checkpoint."
        ) from error
    tensors = adapter_tensors(state, adapter_name, source)
    options.inference_mode = True
    with appearing_whole(output) as directory:
        save_file(tensors, directory / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
        options.save_pretrained(str(directory))
        with open_tensors(directory) as file:
            ranks, _ = survey(file, options)
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    return Conversion(output, written_by, len(ranks), size)


def complete_sharded_checkpoint(checkpoint: Path, model: Any) -> None:
    """Put the adapter's config, which the Trainer leaves out, beside FSDP2's shards; for one process of a run.

    Args:
        checkpoint: the checkpoint-N directory.
        model: the trained model, a PEFT model or a wrapper of one.
    """
    model = getattr(model, "module", model)
    if not (checkpoint / FSDP_SHARDS).is_dir() or not isinstance(model, PeftModel):
        return
    config = deepcopy(model.active_peft_config)
    config.inference_mode = True
    config.save_pretrained(str(checkpoint))
    logger.warning(
        "FSDP2 saves shards, and trainer.save_model() saves no adapter. This makes one of them: "
        "sorsa convert-checkpoint %s -o DIRECTORY", checkpoint,
    )  # fmt: skip


def _reader(source: Path) -> tuple[str, Callable[[Path], dict[str, torch.Tensor]]]:
    if (source / FSDP_SHARDS).is_dir():
        return "FSDP2", _read_fsdp
    if (source / DEEPSPEED_TAG).is_file():
        return "DeepSpeed", _read_deepspeed
    if (source / SAFETENSORS_WEIGHTS_NAME).is_file():
        raise ForeignAdapterError(f"{source} holds the complete adapter already: use the directory as it is.")
    raise ForeignAdapterError(
        f"{source} holds neither {FSDP_SHARDS} (FSDP2's shards) nor {DEEPSPEED_TAG} (DeepSpeed's partitions); expected "
        "a checkpoint-N directory of a training run."
    )


def _read_fsdp(source: Path) -> dict[str, torch.Tensor]:
    from torch.distributed.checkpoint import CheckpointException
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    require_tensors_alone(source / FSDP_SHARDS)
    with tempfile.TemporaryDirectory() as directory:
        whole = Path(directory) / "model.pt"
        try:
            dcp_to_torch_save(source / FSDP_SHARDS, whole)
        except CheckpointException as error:
            raise ValueError(str(error)) from error
        return torch.load(whole, weights_only=True)["model"]


def _read_deepspeed(source: Path) -> dict[str, torch.Tensor]:
    try:
        from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
    except ImportError as error:
        raise MissingPackageError(
            f"DeepSpeed wrote {source}, and it takes DeepSpeed to read it: pip install 'sorsa-plugin[deepspeed]'"
        ) from error
    with contextlib.redirect_stdout(sys.stderr):  # it prints
        return get_fp32_state_dict_from_zero_checkpoint(str(source), exclude_frozen_parameters=True)


def _directory_of_config(source: Path, given: str | PathLike[str] | None) -> Path:
    if given is not None:
        return Path(given)
    found = next((place for place in (source, source.resolve().parent) if (place / CONFIG_NAME).is_file()), None)
    if found is None:
        raise ForeignAdapterError(
            f"Neither {source} nor the directory around it holds {CONFIG_NAME}, which FSDP2's shards lack and "
            "SORSACallback writes beside them. Give the directory of one with --config: that of `sorsa init`, or of "
            "get_peft_model(model, SORSAConfig(...)).save_pretrained(directory) with the options of the run."
        )
    return found


def adapter_tensors(state: dict[str, Any], adapter_name: str, source: Path) -> dict[str, torch.Tensor]:
    """The tensors of one adapter in a state dict, under the names of an adapter file.

    Args:
        state: trained tensors and buffers, named as in a model or as in an adapter file.
        adapter_name: which adapter.
        source: where the state comes from, for messages.

    Raises:
        ForeignAdapterError: the state has no tensors of that adapter.
    """
    found, others = {}, set()
    for name, tensor in state.items():
        match = NAMED.search(name)
        # FSDP2's shards are named as in an adapter file: there a part of the adapter follows, not an adapter's name
        named = match is not None and match[2] not in (*OFFSETS, *FROZEN)
        if named and match is not None:
            if match[2] != adapter_name:
                others.add(match[2])
                continue
            kept = "" if match[1] == "modules_to_save" else f".{match[1]}"
            name = name[: match.start()] + kept + name[match.end() :]
        found[name] = tensor.detach().contiguous().clone()
    if not any(".sorsa_factors." in name for name in found):
        names = ", ".join(sorted(others)) or "none"
        raise ForeignAdapterError(
            f"{source} holds no SORSA adapter named {adapter_name!r}; it has: {names}. Give its name with --adapter."
        )
    return found
