"""SORSA in Axolotl: `plugins: [sorsa_axolotl.SORSAPlugin]` and `adapter: sorsa` or `qsorsa` in a recipe.

Axolotl is imported when the plug-in is first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .plugin import SORSAPlugin

__all__ = ["SORSAPlugin"]


def __getattr__(name: str) -> Any:
    from .requirement import import_plugin

    if name != "SORSAPlugin":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; Axolotl's plug-in is SORSAPlugin.")
    return import_plugin()
