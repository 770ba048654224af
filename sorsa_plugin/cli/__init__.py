"""The `sorsa` command line: the only part of the package that prints."""

from .app import build_app, main

__all__ = ["build_app", "main"]
