"""The `sorsa` command line: the only part that prints.

It stands beside `sorsa_plugin`, not in it, because importing that registers SORSA with PEFT and so imports torch. Help
needs neither: `sorsa_plugin` is imported inside commands alone.
"""

from .app import build_app, main

__all__ = ["build_app", "main"]
