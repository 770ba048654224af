"""Makes a trainer load the adapters that it saved where it does not find or know them by itself: at the end of a run
the best, at the beginning of a resumed one the last.

PEFT saves the adapter "default" beside the Trainer's state, and any other in a folder of its name. The Trainer looks
for the best adapter beside its state alone, and keeps the last one if there is none. The adapter of transformers' own
`model.add_adapter()` it saves beside its state, and looks for a whole model there.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, load_peft_weights, set_peft_model_state_dict

from sorsa_plugin.extend import say, sorsa_layers

from .trainer_compat import LOADS_A_CHECKPOINT, LOADS_THE_BEST, replace

FILE = "adapter_model.safetensors"


def load_adapters_of(trainer: Any) -> None:
    """Make a trainer load them. Where an engine holds the model in pieces, the Trainer's own way stays."""

    def best(load: Callable[..., None]) -> Callable[..., None]:
        def load_best() -> None:
            checkpoint = Path(trainer.state.best_model_checkpoint)
            if _is_of_added_adapter(trainer, checkpoint):
                _load_added_adapter(trainer.model, checkpoint)
            else:
                load()
                _load_named_adapters(trainer.model, checkpoint)

        return load_best

    def last(load: Callable[..., None]) -> Callable[..., None]:
        def load_checkpoint(resume_from_checkpoint: str, model: Any = None) -> None:
            if _is_of_added_adapter(trainer, Path(resume_from_checkpoint)):
                _load_added_adapter(trainer.model, Path(resume_from_checkpoint))
            else:
                load(resume_from_checkpoint, model)

        return load_checkpoint

    replace(trainer, LOADS_THE_BEST, best)
    replace(trainer, LOADS_A_CHECKPOINT, last)


def _load_named_adapters(model: Any, checkpoint: Path) -> None:
    """Load the active SORSA adapters that a checkpoint holds in folders of their names."""
    for name in getattr(model, "active_adapters", []) if isinstance(model, PeftModel) else []:
        own = [layer.factors(name).dU for layer in sorsa_layers(model) if name in layer.sorsa_factors]
        if own and (checkpoint / name / FILE).is_file() and all(map(_is_whole, own)):
            model.load_adapter(str(checkpoint / name), name, is_trainable=True)
            say("The adapter %s has the values of the best checkpoint, %s.", name, checkpoint)


def _is_of_added_adapter(trainer: Any, checkpoint: Path) -> bool:
    in_pieces = trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled
    wrapped = isinstance(trainer.model, PeftModel)
    return not (in_pieces or wrapped) and bool(sorsa_layers(trainer.model)) and (checkpoint / FILE).is_file()


def _load_added_adapter(model: Any, checkpoint: Path) -> None:
    """Into the model's own tensors, which the optimizer may know. Transformers saves one active adapter."""
    (name,) = model.active_adapters()
    saved = load_peft_weights(str(checkpoint), device="cpu")
    tensors = {key.removeprefix("base_model.model."): tensor for key, tensor in saved.items()}
    set_peft_model_state_dict(model, tensors, adapter_name=name)


def _is_whole(offset: Any) -> bool:
    return type(offset.data) is torch.Tensor and not hasattr(offset, "ds_id")
