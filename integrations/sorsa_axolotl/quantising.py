"""Makes Axolotl quantise the base model for this package's adapters as it does for LoRA's.

Axolotl 0.19 decides by the adapter's name alone: 4 bits for `adapter: qlora`, 8 for `adapter: lora`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

from .axolotl_compat import BY_NAME, ModelLoader
from .recipe import ADAPTERS


def quantise_as_for_lora() -> None:
    """Make the loader treat recipes with our adapters and load_in_4bit or load_in_8bit as those of qlora and lora."""
    for name in BY_NAME:
        method = getattr(ModelLoader, name)
        if not getattr(method, "knows_sorsa", False):
            setattr(ModelLoader, name, _under_a_known_name(method))


def _under_a_known_name(method: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(method)
    def call(loader: Any, *args: Any, **kwargs: Any) -> Any:
        cfg, name = loader.cfg, loader.cfg.adapter
        if name not in ADAPTERS or not (cfg.load_in_4bit or cfg.load_in_8bit):
            return method(loader, *args, **kwargs)
        cfg.adapter = "qlora" if cfg.load_in_4bit else "lora"
        try:
            return method(loader, *args, **kwargs)
        finally:
            cfg.adapter = name

    call.knows_sorsa = True  # type: ignore[attr-defined]
    return call
