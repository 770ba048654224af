"""Installed means known: PEFT knows SORSA in every process, without an import in the script.

`import torch` calls `watch_peft`, by an entry point of torch's group `torch.backends`. At the end of `import peft`,
`sorsa_plugin` is then imported, which registers itself. This file runs in every process that imports torch: it imports
nothing of weight, and never raises.

`SORSA_AUTOLOAD=0` switches it off, and so does torch's own `TORCH_DEVICE_BACKEND_AUTOLOAD=0`.
"""

from __future__ import annotations

import os
import sys
from importlib import import_module
from importlib.machinery import ModuleSpec
from typing import Any
from warnings import warn

SWITCH = "SORSA_AUTOLOAD"


def watch_peft() -> None:
    """Make the end of `import peft` register SORSA. Torch calls this when it is imported."""
    if os.environ.get(SWITCH) == "0":
        return
    sys.meta_path.insert(0, _Watch())
    _follow(sys.modules.get("peft"))  # there already if its own import is what imports torch


class _Watch:
    """Finds no module. It sees that PEFT begins to import its parts."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if name.startswith("peft."):
            _follow(sys.modules.get("peft"))


class _FollowedSpec(ModuleSpec):
    """PEFT's module spec, which hears that the import is complete.

    CPython (3.3 to 3.14) keeps that in `_initializing`, and sets it to False when all is done. A loader around PEFT's
    own, the documented way, would be too late where PEFT's import is what imports torch.
    """

    @property
    def _initializing(self) -> bool:
        return bool(self.__dict__.get("under way"))

    @_initializing.setter
    def _initializing(self, value: bool) -> None:
        self.__dict__["under way"] = value
        if not value:
            _register()


def _follow(peft: Any) -> None:
    spec = getattr(peft, "__spec__", None)
    if type(spec) is ModuleSpec and getattr(spec, "_initializing", False):
        spec.__dict__["under way"] = spec.__dict__.pop("_initializing")
        spec.__class__ = _FollowedSpec


def _register() -> None:
    if "peft" not in sys.modules:  # its import failed; there may be another
        return
    sys.meta_path[:] = [finder for finder in sys.meta_path if not isinstance(finder, _Watch)]
    if "sorsa_plugin" in sys.modules:  # it registers itself
        return
    try:
        import_module("sorsa_plugin")
    except Exception as error:
        warn(
            f"sorsa-plugin is installed and could not be registered with PEFT: {type(error).__name__}: {error}. "
            f"`sorsa doctor` says more; {SWITCH}=0 leaves it out. Everything else works.",
            stacklevel=2,
        )
