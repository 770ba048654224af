"""What this package uses of DeepSpeed beyond its documented API. Seen in DeepSpeed 0.18 and 0.19.8, on torch 2.13.

Parameters and optimizers carry the attributes named here; `tests/distributed` looks for each on engines that run.
"""

from __future__ import annotations

import gc
import os
import sys
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch.optim.optimizer import Optimizer

ENTRIES = {
    "is_configured": "whether an Accelerator, a launcher or TrainingArguments announced DeepSpeed; by accelerate's "
    "variable and transformers' `deepspeed_config`",
    "gathered": "`deepspeed.zero.GatheredParameters` for those parameters that need it",
    "zero_driving": "the ZeRO 1 or 2 optimizer around a torch optimizer",
    "stage3_of": "the ZeRO 3 optimizers of some parameters",
    "is_linked": "whether ZeRO 1 or 2 knows a parameter's master",
}

STAGE_12 = ("optimizer", "real_dp_process_group", "bit16_groups", "single_partition_of_fp32_groups")
"""Attributes of `DeepSpeedZeroOptimizer`: the torch optimizer, process groups, parameters and flat masters by group."""

STAGE_3 = (
    "optimizer",
    "dp_process_group",
    "grad_position",
    "get_param_id",
    "fp32_partitioned_groups_flat",
    "sub_group_to_group_id",
    "partial_offload",
    "swap_optimizer",
)
"""Attributes of `DeepSpeedZeroOptimizer_Stage3`: as above, and where a parameter lies in the flat masters."""

PARAMETER_12 = ("_hp_mapping",)
"""On a parameter under ZeRO 1 and 2: the link to the part of its master in this process, None where there is none."""

PARAMETER_3 = ("ds_id", "ds_status", "ds_shape", "ds_numel", "_z3_optimizer")
"""On a parameter under ZeRO 3: its identity, whether it is whole, its shape and the optimizer."""

STAGE_12_CLASS, STAGE_3_CLASS = "DeepSpeedZeroOptimizer", "DeepSpeedZeroOptimizer_Stage3"


def is_configured() -> bool:
    """Whether an Accelerator, a launcher or TrainingArguments announced DeepSpeed."""
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true":
        return True
    transformers_side = sys.modules.get("transformers.integrations.deepspeed")
    return transformers_side is not None and transformers_side.deepspeed_config() is not None


def is_loaded() -> bool:
    """Whether this process has imported DeepSpeed."""
    return "deepspeed" in sys.modules


def gathered(parameters: list[Any]) -> AbstractContextManager[Any]:
    """A context in which parameters that ZeRO 3 partitioned are whole; every process enters, and none writes."""
    apart = [p for p in parameters if hasattr(p, "ds_id") and p.ds_status.name == "NOT_AVAILABLE"]
    if not apart:
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(apart)


def is_linked(parameter: Any) -> bool:
    """Whether ZeRO 1 or 2 steps a parameter, on this process or on another."""
    return hasattr(parameter, "_hp_mapping")


def stage3_of(parameters: list[Any]) -> list[Any]:
    """The ZeRO 3 optimizers of some parameters."""
    found = {id(p._z3_optimizer): p._z3_optimizer for p in parameters if hasattr(p, "_z3_optimizer")}
    return list(found.values())


def zero_driving(inner: Optimizer) -> Any:
    """The living DeepSpeed optimizer of ZeRO 1 or 2 that drives a torch optimizer; None where there is none.

    Looks through all objects of the process: DeepSpeed keeps no list of its optimizers, a torch optimizer does not know
    who drives it, and the link on a parameter (`_zero_optimizer`) is there only on processes that hold a part of it.
    """
    from deepspeed.runtime.base_optimizer import ZeROOptimizer

    living = (thing for thing in gc.get_objects() if issubclass(type(thing), ZeROOptimizer))
    return next((thing for thing in living if getattr(thing, "optimizer", None) is inner), None)
