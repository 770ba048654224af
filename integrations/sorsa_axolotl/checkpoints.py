"""Which files of a run are trusted: a checkpoint to resume from, and what is written when training ends."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import PreTrainedModel

from sorsa_plugin.attachment import say
from sorsa_plugin.errors import IncompleteAdapterError
from sorsa_plugin.regularizer import sorsa_layers
from sorsa_transformers.checkpoints import is_complete, last_complete_checkpoint


def choose_checkpoint(cfg: Any) -> None:
    """Have Axolotl resume from the last complete checkpoint; its own choice is the highest number, complete or not.

    Sharded checkpoints of FSDP have other files and are left to Axolotl.

    Raises:
        IncompleteAdapterError: `resume_from_checkpoint` names one that is not complete.
    """
    if cfg.fsdp_config or cfg.fsdp:
        return
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


def save_adapter_alone(model: Any) -> None:
    """Have the base model object save the adapter.

    In DPO and KTO Axolotl keeps the object that the trainer put the adapter into, and saves it into the same directory
    when training ends or is interrupted: a model.safetensors with parts of the adapter in it, that nothing can load.
    """
    if isinstance(model, PeftModel):
        base: Any = model.get_base_model()
        base.save_pretrained = partial(_save, base, model)


def _save(base: PreTrainedModel, adapted: PeftModel, directory: str, *args: Any, **kwargs: Any) -> None:
    if any(sorsa_layers(base)):
        adapted.save_pretrained(directory)
    else:  # merged and unloaded: a model of its own again
        type(base).save_pretrained(base, directory, *args, **kwargs)
