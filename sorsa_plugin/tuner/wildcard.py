"""Resolves "all-linear" for a new adapter: a wildcard adapts what it can, and says in one line what it leaves out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from ..compat.peft import all_linear, check_target_module_exists
from ..errors import UnsupportedLayerError
from ..rank_zero import say
from .layer_choice import some


def resolve_all_linear(config: Any, model: nn.Module, check: Callable[[str, nn.Module], object]) -> None:
    """Replace "all-linear" in the config by the names of the linear layers that can be adapted.

    Left out are layers that their parent reads and does not call (nn.MultiheadAttention's `out_proj`, Mamba's), weights
    computed from other parameters, and quantised layers of an unknown kind. A name given by hand is no wildcard.

    Args:
        config: the adapter's `SORSAConfig`.
        model: the base model.
        check: called with a layer's name and the layer; raises ValueError or UnsupportedLayerError if it cannot be
            adapted.

    Raises:
        ValueError, UnsupportedLayerError: the first refusal, if every layer is refused.
    """
    if not isinstance(config.target_modules, str) or config.target_modules.lower() != "all-linear":
        return
    config.target_modules = all_linear(config, model)
    refused: dict[str, Exception] = {}
    for name, module in model.named_modules():
        if name in config.target_modules and check_target_module_exists(config, name):
            try:
                check(name, module)
            except (ValueError, UnsupportedLayerError) as refusal:
                refused[name] = refusal
    chosen = [name for name in config.target_modules if check_target_module_exists(config, name)]
    if refused and len(refused) == len(chosen):
        raise next(iter(refused.values()))
    config.target_modules -= set(refused)
    if refused:
        say(
            'target_modules="all-linear" leaves out %s, which cannot be adapted as linear layers. Of an '
            "nn.MultiheadAttention, name the attention itself; naming another of them says why.",
            some(list(refused)),
        )
