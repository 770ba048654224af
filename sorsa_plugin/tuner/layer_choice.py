"""Chooses the kind of SORSA layer and the rank for each targeted module, and refuses modules that can have none."""

from __future__ import annotations

import re
import warnings
from typing import Any

from peft import TaskType
from torch import nn
from torch.nn.modules.conv import _ConvNd

from ..compat.peft import BaseTunerLayer, get_pattern_key
from ..compat.transformers import Conv1D
from ..config import SORSAConfig
from ..errors import UnsupportedLayerError
from ..files.ranks import own_rank
from ..layers.layer import SORSALayer
from ..layers.storage import is_quantised
from ..plugins import manager
from ..qsorsa.residual import require_quantised
from ..rank_zero import say

NAMED = 3
"""So many layers are named in a line of the log; the others are counted."""


def layer_class_for(config: SORSAConfig, target: nn.Module, name: str) -> type[SORSALayer]:
    """The kind of layer for a base module. Another method may have adapted the module already.

    Raises:
        UnsupportedLayerError: no kind fits, or the weight is computed from other parameters.
    """
    base: nn.Module = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
    layer_class = manager().hook.sorsa_layer(target=base, config=config)
    if layer_class is None and is_quantised(base):
        raise UnsupportedLayerError(
            f"Target module {name} of type {type(base).__name__} is quantised in a way that SORSA cannot adapt; "
            "bitsandbytes' Linear4bit and Linear8bitLt, quantised by moving them to their device, and torchao's "
            "int8 weight-only linears are. Load the base so, or unquantised, or add the module to exclude_modules."
        )
    if layer_class is None:
        raise UnsupportedLayerError(
            f"Target module {name} of type {type(base).__name__} is not supported by SORSA; unquantised "
            "nn.Linear, transformers' Conv1D, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d and "
            "nn.MultiheadAttention (as a whole) are, and what plug-ins add. Narrow target_modules, or add it to "
            "exclude_modules."
        )
    parameter = layer_class.parameter_name
    if hasattr(base, parameter) and parameter not in base._parameters:
        raise UnsupportedLayerError(
            f"The {parameter} of target module {name} is computed from other parameters (weight_norm, "
            "spectral_norm or another parametrization); expected a parameter of its own. Make it one, with "
            "torch.nn.utils.parametrize.remove_parametrizations() or torch.nn.utils.remove_weight_norm(), or add "
            "the module to exclude_modules."
        )
    return layer_class


def new_layer(config: SORSAConfig, target: nn.Module, name: str) -> SORSALayer:
    """The SORSA layer for a base module, still without an adapter. Another method may have adapted the module already.

    Raises:
        UnsupportedLayerError: see `layer_class_for`.
        BaseMismatchError: the config asks for a residual base, and the module is not quantised.
    """
    layer_class = layer_class_for(config, target, name)
    base: nn.Module = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
    stored_in_out = isinstance(base, Conv1D)
    if config.fan_in_fan_out != stored_in_out:
        warnings.warn(
            f"fan_in_fan_out is set to {config.fan_in_fan_out} but the target module {name} is a "
            f"{type(base).__name__}. Setting fan_in_fan_out to {stored_in_out}.",
            stacklevel=2,
        )
        config.fan_in_fan_out = stored_in_out
    layer = layer_class(target, name)
    if config.residual_base and not config.factors_from_file:
        require_quantised(layer)
    return layer


def say_unmatched(model: nn.Module, names: set[str], layers: list[SORSALayer]) -> None:
    """Log which names in target_modules adapted nothing: PEFT refuses only if none of them does."""
    adapted = [layer.name for layer in layers]
    unmatched = sorted(name for name in names if not any(f".{path}".endswith(f".{name}") for path in adapted))
    if not unmatched:
        return
    stacks = {
        ".".join(f"{path}.{name}".split(".")[-3:])
        for path, module in model.named_modules()
        for name, parameter in module._parameters.items()
        if parameter is not None and parameter.ndim == 3 and not isinstance(module, _ConvNd)
    }
    remedy = f" Stacks of experts are named by target_parameters: {sorted(stacks)}." if stacks else ""
    say("target_modules names %s, and no module of that name is adapted.%s", ", ".join(unmatched), remedy)


def say_other_inputs(model: Any, config: SORSAConfig) -> None:
    """Log where PEFT's model for the task would hand the base model tokens, and it takes something else (Whisper)."""
    takes = getattr(model, "main_input_name", "input_ids")
    if config.task_type == TaskType.SEQ_2_SEQ_LM and takes != "input_ids" and not config.factors_from_file:
        say(
            "With task_type SEQ_2_SEQ_LM PEFT's forward passes input_ids, and %s takes %s. Leave task_type out.",
            type(model).__name__, takes,
        )  # fmt: skip


class Ranks:
    """The ranks of a new adapter's layers, and which of them are less than was asked because a weight is narrow.

    Args:
        config: the adapter's.
        fused: {pattern of parameters: rank} of stacks that hold several projections; see `experts.py`.
    """

    def __init__(self, config: SORSAConfig, fused: dict[str, int]) -> None:
        self.config = config
        self.fused = fused
        self.of_fused: dict[str, dict[str, int]] = {}
        self.narrowed: dict[int, list[str]] = {}

    def of(self, name: str, layer: SORSALayer) -> int:
        """The rank of the adapter on a layer; see `rank_of`."""
        own = own_rank(self.config, name)
        if own is not None:
            return own
        pattern = get_pattern_key(list(self.fused), name)
        asked, most = self.fused.get(pattern, self.config.r), min(layer.out_features, layer.in_features)
        rank = min(asked, most)
        if pattern in self.fused:
            self.of_fused.setdefault(pattern, {})[name] = rank
        if rank < asked:
            self.narrowed.setdefault(rank, []).append(name)
        return rank

    def note(self) -> None:
        """Note in `rank_pattern` the ranks of stacks that hold several projections: `r` does not give those."""
        for pattern, ranks in self.of_fused.items():
            alike = len(set(ranks.values())) == 1
            named = {f"^{re.escape(name)}": rank for name, rank in ranks.items()}  # a bare name also matches endings
            self.config.rank_pattern |= {pattern: next(iter(ranks.values()))} if alike else named

    def say(self) -> None:
        """Log in one line which layers have a lower rank, and which. A saved adapter's were told when it was made."""
        if self.narrowed and not self.config.factors_from_file:
            listed = [f"{rank} on {some(names)}" for rank, names in sorted(self.narrowed.items())]
            say("r is %d, and narrower weights have fewer triplets; the rank is %s.", self.config.r, "; ".join(listed))


def some(names: list[str]) -> str:
    """The first names of a list, and how many more there are."""
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more
