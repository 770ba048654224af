"""What this package uses of accelerate beyond its documented API. Seen in accelerate 1.11.0 and 1.15.0."""

from __future__ import annotations

from typing import Any

import torch
from accelerate.hooks import add_hook_to_module, remove_hook_from_module
from accelerate.utils import align_module_device, has_offloaded_params

ENTRIES = {
    "add_hook_to_module": "to give a module's hook to the plain module that takes its place",
    "remove_hook_from_module": "to bring offloaded weights back for good; gone: `module.to(device)`",
    "align_module_device": "offloaded weights on the device that computes, for a moment",
    "has_offloaded_params": "whether accelerate keeps a module's weights elsewhere",
    "execution_device": "where it brings them",
    "hook_of": "accelerate's hook of a module",
}


def execution_device(module: Any) -> torch.device | None:
    """The device to which accelerate brings an offloaded module's weights; None if the module is not offloaded."""
    return torch.empty(0, device=module._hf_hook.execution_device).device if has_offloaded_params(module) else None


def hook_of(module: Any) -> Any:
    """accelerate's hook of a module, which brings inputs to the module's device; None if there is none."""
    return getattr(module, "_hf_hook", None)
