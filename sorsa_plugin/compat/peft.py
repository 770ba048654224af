"""What this package uses of PEFT beyond its documented API.

Seen in PEFT 0.20.0 and 0.21.2. `ENTRIES` gives the purpose of each name, and what to do if it disappears. `OVERRIDDEN`
and `BORROWED` name the methods of PEFT's classes that ours replace, extend or take over.
"""

from __future__ import annotations

from copy import copy
from typing import Any

from peft import LoraConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.model import LoraModel
from peft.tuners.tuners_utils import (
    BaseTuner,
    BaseTunerLayer,
    _maybe_include_all_linear_layers,
    check_adapters_to_merge,
    check_target_module_exists,
)
from peft.utils import PeftType, transformers_weight_conversion
from peft.utils.constants import EMBEDDING_LAYER_NAMES, TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from peft.utils.other import AuxiliaryTrainingWrapper, TrainableTokensWrapper, get_pattern_key

ENTRIES = {
    "PEFT_TYPE_TO_CONFIG_MAPPING": "PEFT's registry, to list its methods and to see whether SORSA is ours; gone: ask "
    "`get_peft_config` by name",
    "PEFT_TYPE_TO_PREFIX_MAPPING": "prefixes of every method's tensors, to refuse a foreign file; gone: list them here",
    "PEFT_TYPE_TO_TUNER_MAPPING": "as the first, for `sorsa doctor`",
    "LoraLayer": "to read A and B of a LoRA in `sorsa analyze`; gone: read them from the state dict",
    "LoraModel": "its methods in `BORROWED`",
    "BaseTuner": "what `SORSAModel` derives from",
    "BaseTunerLayer": "what `SORSALayer` derives from",
    "check_adapters_to_merge": "which adapters a merge takes, and its warning; gone: write its ten lines out",
    "check_target_module_exists": "whether a config selects a module; gone: match as PEFT's docs say",
    "EMBEDDING_LAYER_NAMES": "layers that PEFT saves with an adapter, which cannot fold; gone: list them here",
    "TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING": "default targets of an architecture; gone: require "
    "target_modules",
    "AuxiliaryTrainingWrapper": "wrappers of modules_to_save and trained tokens; gone: find them by attribute",
    "TrainableTokensWrapper": "which rows of an embedding are trained",
    "get_pattern_key": "which key of rank_pattern fits a name; gone: write its regular expression out",
    "add_peft_type": "the enum member SORSA; gone, once PEFT lets its types be extended: use that",
    "all_linear": 'which layers "all-linear" selects; gone: list nn.Linear and Conv1D, without the output layer',
    "layers_of_users": "modules that a LoraConfig makes layers of a user's own class of; gone: there are none",
    "targets_of_lora": "what a LoRA's targets become on a model of experts; gone: leave the targets as they are",
}

OVERRIDDEN = {
    BaseTuner: (
        "inject_adapter",
        "_pre_injection_hook",
        "_unload_and_optionally_merge",
        "delete_adapter",
        "merge_adapter",
        "_check_new_adapter_config",
        "_get_module_names_tied_with_embedding",
        "_replace_module",
        "_cast_adapter_dtype",
        "_check_target_module_compatiblity",
        "_create_and_replace",
    ),
    LoraModel: ("_enable_peft_forward_hooks",),  # which PeftModel calls where a tuner has it
    BaseTunerLayer: (
        "set_adapter",
        "delete_adapter",
        "set_requires_grad",
        "_move_adapter_to_device_of_base_layer",
        "supports_lora_conversion",
        "get_base_layer",
    ),
}
"""{PEFT's class: methods that ours extends or replaces}. After a rename by PEFT, ours would never be called."""

CALLED = {
    BaseTuner: ("_check_tied_module_exists",),
    AuxiliaryTrainingWrapper: ("_get_available_adapters", "delete_adapter"),
}
"""{PEFT's class: other methods that ours calls}."""

SELECTING = (
    "r",
    "rank_pattern",
    "target_modules",
    "target_parameters",
    "exclude_modules",
    "modules_to_save",
    "layers_to_transform",
    "layers_pattern",
    "task_type",
)
"""Options of LoRA and of `SORSAConfig` that say which modules are adapted, and at which rank."""

BORROWED = ("_prepare_adapter_config", "_add_modules_to_save_to_tie", "_add_targets_to_tie")
"""Methods of `LoraModel` that are about LoRA in name only: they read fields that `SORSAConfig` has too."""


def add_peft_type(name: str) -> None:
    """Add a member to `PeftType` whose name equals its value. Does nothing if the member exists.

    PEFT's enum is closed and has no way to extend it. A member of a `str` enum is a `str` with these attributes, listed
    in these tables (CPython's `enum.py`, the same from 3.10 to 3.13). Because its name equals its value, pickling by
    value finds it in a fresh process that has imported this package.
    """
    if name in PeftType.__members__:
        return
    enum_class: Any = PeftType
    member = str.__new__(enum_class, name)
    member._name_ = name
    member._value_ = name
    member.__objclass__ = enum_class
    member._sort_order_ = len(enum_class._member_names_)
    enum_class._member_names_.append(name)
    enum_class._member_map_[name] = member
    enum_class._value2member_map_[name] = member
    type.__setattr__(enum_class, name, member)


def all_linear(config: Any, model: Any) -> set[str]:
    """The names of the modules that a config whose `target_modules` is "all-linear" selects in a model."""
    return set(_maybe_include_all_linear_layers(copy(config), model).target_modules)


def layers_of_users(lora: LoraConfig) -> dict[type, type]:
    """{class of modules: a user's own LoRA layer for them}, which `LoraConfig._register_custom_module` is given."""
    return getattr(lora, "_custom_modules", None) or {}


def targets_of_lora(config: Any, model: Any) -> LoraConfig:
    """A LoRA with the options of `config` that select modules, as PEFT rewrites them for this model.

    Transformers 5 holds the experts of an architecture in stacks. For LoRA alone, PEFT turns the names that they had
    before, `"all-linear"` and regular expressions into `target_parameters`, and gives two projections that are now one
    the sum of their ranks, in `rank_pattern`.

    Raises:
        ValueError: `config` names one of two projections that are now one.
    """
    lora = LoraConfig(**{name: copy(getattr(config, name)) for name in SELECTING})
    transformers_weight_conversion.convert_peft_config_for_transformers(lora, model, None)
    return lora
