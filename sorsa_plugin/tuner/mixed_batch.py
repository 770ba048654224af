"""Batches whose rows use different adapters, at inference, as in PEFT's LoRA; knows no layer kind.

    model(x, adapter_names=["first", "second", "__base__"])      model.generate(**inputs, adapter_names=[...])

While the context lasts, pre-forward hooks pass each adapted layer one name per row. A kind that takes `adapter_names`
in its `forward` calls `rows_by_adapter` to find each adapter's rows. An ordinary forward pays nothing for this.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn

from ..compat.peft import AuxiliaryTrainingWrapper
from ..layers.layer import SORSALayer, sorsa_layers

BASE = "__base__"
"""PEFT's name for rows that use no adapter."""


@contextmanager
def mixed_batch(model: nn.Module, adapter_names: Sequence[str], copies: int = 1) -> Iterator[None]:
    """Let each row of the batches in this context use the adapter named for it.

    Args:
        model: the base model with SORSA layers, in eval mode.
        adapter_names: one name per row of the inputs; "__base__" for none.
        copies: how often generation repeats each row, see `copies_per_row`. An encoder sees each row once.

    Raises:
        TypeError: adapter_names is no list or tuple.
        ValueError: the model is in training mode, or has no adapter of a given name.
    """
    if not isinstance(adapter_names, (list, tuple)):
        raise TypeError(f"Got adapter names of type {type(adapter_names)}, expected a list of str.")
    if model.training:
        raise ValueError("Cannot pass `adapter_names` when the model is in training mode.")
    known = {BASE}.union(*(layer.sorsa_factors for layer in sorsa_layers(model)))
    unknown = sorted(set(adapter_names) - known)
    if unknown:
        raise ValueError(f"Trying to infer with non-existing adapter(s): {', '.join(unknown)}")

    once, encoder = set(_encoder_modules(model)), list(adapter_names)
    repeated = [name for name in adapter_names for _ in range(copies)]
    with ExitStack() as hooks:
        for module in model.modules():
            if isinstance(module, (SORSALayer, AuxiliaryTrainingWrapper)):
                names = encoder if module in once else repeated
                hooks.enter_context(module.register_forward_pre_hook(_hand_over(names), with_kwargs=True))
        yield


def copies_per_row(generate_arguments: dict[str, Any]) -> int:
    """How often `generate` repeats each row, by its arguments: for beams, and for several sequences per row."""
    config = generate_arguments.get("generation_config")
    asked = [
        generate_arguments.get(name, getattr(config, name, None)) for name in ("num_beams", "num_return_sequences")
    ]
    return max([1, *(number for number in asked if isinstance(number, int))])


def _hand_over(names: list[str]) -> Any:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return args, {**kwargs, "adapter_names": names}

    return hook


def _encoder_modules(model: Any) -> Iterator[nn.Module]:
    """The modules of an encoder-decoder model's encoder; none if `get_encoder` returns the model itself."""
    encoder = model.get_encoder() if hasattr(model, "get_encoder") else model
    if encoder is not model:
        yield from encoder.modules()
