"""Loads the best adapter at the end of training where the Trainer does not find it: in a folder of its own name.

PEFT saves the adapter "default" beside the Trainer's state, and any other in a folder of its name. The Trainer looks
for the best adapter beside its state alone, and keeps the last one if there is none.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from sorsa_plugin.extend import say, sorsa_layers


def load_best_adapters(model: Any, checkpoint: str) -> None:
    """Load the active SORSA adapters that a checkpoint holds in folders of their names.

    Does nothing for sharded and partitioned adapters, which engines load themselves.
    """
    for name in getattr(model, "active_adapters", []):
        folder = Path(checkpoint) / name
        own = [layer.factors(name).dU for layer in sorsa_layers(model) if name in layer.sorsa_factors]
        if own and (folder / "adapter_model.safetensors").is_file() and all(map(_is_whole, own)):
            model.load_adapter(str(folder), name, is_trainable=True)
            say("The adapter %s has the values of the best checkpoint, %s.", name, checkpoint)


def _is_whole(offset: Any) -> bool:
    return type(offset.data) is torch.Tensor and not hasattr(offset, "ds_id")
