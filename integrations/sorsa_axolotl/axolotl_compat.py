"""What this package uses of Axolotl, and of its training stack, beyond their documented API. Seen in Axolotl 0.19.0."""

from __future__ import annotations

from accelerate.utils.constants import FSDP_MODEL_NAME
from axolotl.integrations.base import AdapterCapabilities, BasePlugin
from axolotl.loaders.adapter import find_all_linear_names
from axolotl.loaders.model import ModelLoader
from axolotl.utils.train import determine_last_checkpoint
from transformers.trainer import TRAINER_STATE_NAME

ENTRIES = {
    "FSDP_MODEL_NAME": "what accelerate calls the model's file in a checkpoint of FSDP",
    "AdapterCapabilities": "how a plug-in names its adapters",
    "BasePlugin": "what `SORSAPlugin` derives from",
    "find_all_linear_names": "what lora_target_linear means in a model; gone: PEFT's all-linear",
    "ModelLoader": "what quantises by the adapter's name; its methods in `BY_NAME`",
    "determine_last_checkpoint": "which checkpoint a sharded run resumes from",
    "TRAINER_STATE_NAME": "the file that the Trainer writes last in a checkpoint",
}

BY_NAME = ("_set_quantization_config", "_prepare_model_for_quantization")
"""Methods of Axolotl's loader that check the adapter's name: they decide what is quantised, and what is cast for
training. Delete `quantising.py` once Axolotl asks its plug-ins instead."""

PLUGIN = (
    "register",
    "get_input_args",
    "get_adapter_capabilities",
    "pre_model_load",
    "load_adapter",
    "add_callbacks_post_trainer",
    "post_trainer_create",
    "post_train",
)
"""Methods of `BasePlugin` that ours replaces."""
