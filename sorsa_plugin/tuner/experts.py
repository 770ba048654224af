"""Targets of a new adapter on a model of experts: PEFT rewrites a LoRA's there, and ours are to mean the same."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..compat.peft import check_target_module_exists, targets_of_lora
from ..config import SORSAConfig
from ..layers.unwrapped import without_adapters
from ..rank_zero import say


def adapt_experts_as_lora(config: Any, model: nn.Module) -> dict[str, int]:
    """Rewrite `target_modules` and `target_parameters` of a new adapter as PEFT does for LoRA, and say so in one line.

    Transformers holds the experts of an architecture in stacks, which are parameters and no modules. "all-linear",
    and the names that the experts' projections had before, select those. `None` stays PEFT's default for the
    architecture, and the options of a saved adapter stay as they are.

    Args:
        config: the adapter's `SORSAConfig`; its options are replaced.
        model: the base model, which may carry adapters already.

    Returns:
        {pattern of parameters: rank} where a stack holds several projections: the sum of their ranks.

    Raises:
        ValueError: the targets name one of two projections that are now one.
    """
    if (
        config.factors_from_file
        or config.target_modules is None
        or not hasattr(getattr(model, "config", None), "model_type")
    ):
        return {}
    with without_adapters(model):
        lora = targets_of_lora(config, model)
        modules, parameters = set(lora.target_modules), sorted(lora.target_parameters or ())
        if set(parameters) == set(config.target_parameters or ()):
            _say_widened(config, modules, model)
            return {}
        left = _left_out(config, modules, model)
    fused = {key: rank for key, rank in lora.rank_pattern.items() if key not in config.rank_pattern}
    config.target_modules, config.target_parameters = modules, parameters
    say(
        "Experts are stacks of weights here, so target_modules means, as for LoRA, the modules %s and the parameters "
        "%s in every layer.%s",
        ", ".join(sorted(modules)) or "(none)", ", ".join(parameters),
        f" Not adapted: {len(left)} modules outside of the stacks, such as {left[0]}. To adapt them, name their "
        "weights in target_parameters." if left else "",
    )  # fmt: skip
    return fused


def _selected(config: Any, model: nn.Module) -> list[str]:
    """The modules that target_modules selects by name."""
    return [name for name, _ in model.named_modules() if name and check_target_module_exists(config, name)]


def _left_out(config: SORSAConfig, modules: set[str], model: Any) -> list[str]:
    """Linear layers that the targets selected before, and whose names PEFT now takes for the experts'."""
    if config.target_modules == "all-linear":
        head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
        before = [
            name for name, module in model.named_modules() if isinstance(module, nn.Linear) and module is not head
        ]
    else:
        before = [name for name in _selected(config, model) if isinstance(model.get_submodule(name), nn.Linear)]
    return [name for name in before if not any(f".{name}".endswith(f".{target}") for target in modules)]


def _say_widened(config: SORSAConfig, modules: set[str], model: nn.Module) -> None:
    """Say where PEFT would turn an expression that selects no expert into names, and so into more modules for LoRA."""
    if isinstance(config.target_modules, str) and config.target_modules != "all-linear":
        ours = _selected(config, model)
        theirs = [name for name, _ in model.named_modules() if name.rpartition(".")[2] in modules]
        if ours and len(theirs) > len(ours):
            say(
                "target_modules=%r selects %d modules. For LoRA PEFT would adapt all %d whose names end alike.",
                config.target_modules, len(ours), len(theirs),
            )  # fmt: skip
