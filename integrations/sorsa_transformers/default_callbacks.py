"""Makes every Trainer begin with `SORSAMetrics` and `SORSATrainerMethods`: both work where nobody passed a callback."""

from __future__ import annotations

import sys
from importlib.machinery import PathFinder
from types import ModuleType
from typing import Any

from sorsa_plugin.extend import say

TRAINER = "transformers.trainer"


def join_every_trainer() -> None:
    """Do so now, or once transformers' trainer module is imported, which no other use of an adapter needs."""
    if TRAINER in sys.modules:
        _add()
    else:
        sys.meta_path.insert(0, _Watch())


class _Watch:
    """Finds the trainer module as it would be found anyway, and acts when it is executed: some only look for it."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        spec = PathFinder.find_spec(name, path) if name == TRAINER else None
        if spec is None or spec.loader is None:
            return None
        loader: Any = spec.loader
        execute = loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            if self in sys.meta_path:
                sys.meta_path.remove(self)
            _add()

        loader.exec_module = exec_module
        return spec


def _add() -> None:
    """Put them among the Trainer's own. If that cannot be, it is logged: training does not need them."""
    try:
        from .metrics import SORSAMetrics
        from .trainer_compat import DEFAULT_CALLBACKS
        from .trainer_methods import SORSATrainerMethods
    except ImportError as error:
        say("The Trainer does not log SORSA's metrics: %s.", error)
        return
    ours = (SORSAMetrics, SORSATrainerMethods)
    DEFAULT_CALLBACKS.extend(callback for callback in ours if callback not in DEFAULT_CALLBACKS)
