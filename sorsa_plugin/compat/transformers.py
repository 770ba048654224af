"""What this package uses of transformers beyond its documented API. Seen in transformers 5.6.0 and 5.23.0."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    build_glob_alternation,
    dot_natural_key,
    rename_source_key,
    revert_weight_conversion,
)
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.integrations.peft import MIN_PEFT_VERSION
from transformers.modeling_utils import load_state_dict, str_to_torch_dtype
from transformers.pytorch_utils import Conv1D
from transformers.utils.generic import ContextManagers

ENTRIES = {
    "get_model_conversion_mapping": "how from_pretrained renames, fuses and splits stored tensors; gone: follow "
    "`from_pretrained` to what took its place",
    "WeightConverter": "as above: one conversion",
    "WeightRenaming": "as above: one renaming",
    "dot_natural_key": "as above: the order in which stored tensors are taken",
    "rename_source_key": "as above: which parameter a stored tensor belongs to",
    "revert_weight_conversion": "as above, back again: for `sorsa merge`",
    "is_deepspeed_zero3_enabled": "whether models are made in pieces; gone: ask the environment of accelerate",
    "MIN_PEFT_VERSION": "which PEFT `model.add_adapter` and `load_adapter` take; gone: nothing to compare",
    "load_state_dict": "the header of a safetensors file as meta tensors; gone: read it with safetensors",
    "str_to_torch_dtype": "safetensors' names of dtypes; gone: list them here",
    "Conv1D": "GPT-2's linear layer",
    "build_on_meta": "a model of a config on the meta device; gone: `accelerate.init_empty_weights`",
    "kept_in_fp32": "which parameters from_pretrained keeps in fp32; gone: none",
}


def build_on_meta(build: Any, config: Any, dtype: torch.dtype) -> PreTrainedModel:
    """`build(config, dtype=dtype)` as from_pretrained runs it: on the meta device, without initialising weights.

    Raises:
        ValueError: transformers has no model for the config.
    """
    with ContextManagers(PreTrainedModel.get_init_context(dtype, False, False, None)):
        return build(config, dtype=dtype)


def kept_in_fp32(model: PreTrainedModel, dtype: torch.dtype) -> list[str]:
    """The names of the parameters that from_pretrained keeps in fp32 when `dtype` is requested."""
    patterns = model._get_dtype_plan(dtype)
    if not patterns:
        return []
    pattern, *_ = build_glob_alternation(list(patterns))
    return [name for name, _ in model.named_parameters() if pattern.search(name)]
