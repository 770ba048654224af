"""Decides which files of a run are trusted: the checkpoint to resume from, and what is written when training ends."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import PreTrainedModel

from sorsa_plugin import SORSAConfig
from sorsa_plugin.errors import ForeignAdapterError, IncompleteAdapterError
from sorsa_plugin.extend import read_config, say, sorsa_layers
from sorsa_transformers.checkpoints import is_complete, last_complete_checkpoint

from .axolotl_compat import FSDP_MODEL_NAME, TRAINER_STATE_NAME, determine_last_checkpoint

IN_SHARDS = "Set state_dict_type: SHARDED_STATE_DICT and final_state_dict_type: FULL_STATE_DICT in fsdp_config."


def choose_checkpoint(cfg: Any) -> None:
    """Make Axolotl resume from the last complete checkpoint; its own choice is the highest number, complete or not.

    Args:
        cfg: Axolotl's configuration, changed in place.

    Raises:
        IncompleteAdapterError: `resume_from_checkpoint` names a checkpoint that is not complete; or a sharded run would
            resume from one that is not complete, or that would not be read completely.
        ForeignAdapterError: the checkpoint is of another method.
    """
    if cfg.fsdp_config or cfg.fsdp:
        return check_sharded_checkpoint(cfg)
    last = last_complete_checkpoint(cfg.output_dir)
    if cfg.resume_from_checkpoint:
        if not is_complete(Path(cfg.resume_from_checkpoint)):
            raise IncompleteAdapterError(
                f"resume_from_checkpoint is {cfg.resume_from_checkpoint}, which is no complete checkpoint; the last "
                f"complete one in {cfg.output_dir} is {last}. Give that, or set auto_resume_from_checkpoints: true."
            )
    elif cfg.auto_resume_from_checkpoints:
        cfg.resume_from_checkpoint = last
        cfg.auto_resume_from_checkpoints = last is not None
        if last is None and any(Path(cfg.output_dir).glob("checkpoint-*")):
            say("No checkpoint in %s is complete: training starts from the beginning.", cfg.output_dir)
    if cfg.resume_from_checkpoint:
        require_own_adapter(cfg.resume_from_checkpoint, read_config(Path(cfg.resume_from_checkpoint)), cfg.adapter)


def require_own_adapter(directory: str, saved: SORSAConfig, word: str) -> None:
    """Raises ForeignAdapterError if a recipe with `adapter: <word>` would train an adapter made with the other word."""
    made_with = "qsorsa" if saved.residual_base else "sorsa"
    if made_with != word:
        raise ForeignAdapterError(
            f"{directory} holds an adapter that was made with adapter: {made_with}, whose base stores other weights; "
            f"the recipe says adapter: {word}. Say adapter: {made_with}, or start a new adapter in another output_dir."
        )


def check_sharded_checkpoint(cfg: Any) -> None:
    """Check the checkpoint from which Axolotl resumes a run under FSDP.

    From a checkpoint in one file, accelerate 1.13 gives only the first process its part back, without a message. The
    other processes' rows of the adapter, LoRA's as well, start anew.

    Raises:
        IncompleteAdapterError: the checkpoint is in one file, or was cut off.
    """
    if cfg.fsdp_config and cfg.fsdp_config.state_dict_type == "FULL_STATE_DICT":
        say("Checkpoints of state_dict_type: FULL_STATE_DICT cannot be resumed from. %s", IN_SHARDS)
    checkpoint = determine_last_checkpoint(cfg)
    if checkpoint is None:
        return
    if not (Path(checkpoint) / TRAINER_STATE_NAME).is_file():
        raise IncompleteAdapterError(
            f"{checkpoint} has no {TRAINER_STATE_NAME}, which is written last: it was cut off. Delete it, or name a "
            "complete one: resume_from_checkpoint."
        )
    if (Path(checkpoint) / f"{FSDP_MODEL_NAME}.bin").is_file():
        raise IncompleteAdapterError(
            f"{checkpoint} was saved with state_dict_type: FULL_STATE_DICT, of which only the first process would get "
            f"its part back. {IN_SHARDS} Train on from its adapter with lora_model_dir: {checkpoint} and another "
            "output_dir (the optimizer's state is lost)."
        )


def save_adapter_alone(model: Any) -> None:
    """Make the base model object save the adapter.

    In DPO and KTO, Axolotl keeps the object that the trainer put the adapter into, and saves it into the same directory
    when training ends or is interrupted. That would be a model.safetensors with parts of the adapter in it, which
    nothing can load.
    """
    if isinstance(model, PeftModel):
        base: Any = model.get_base_model()
        base.save_pretrained = partial(_save, base, model)


def _save(base: PreTrainedModel, adapted: PeftModel, directory: str, *args: Any, **kwargs: Any) -> None:
    if any(sorsa_layers(base)):
        adapted.save_pretrained(directory)
    else:  # merged and unloaded: a plain model again
        type(base).save_pretrained(base, directory, *args, **kwargs)
