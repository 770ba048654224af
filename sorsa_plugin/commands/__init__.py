"""The package's own commands of the `sorsa` command line, one a file; each loads what it needs when it runs."""

from __future__ import annotations

from typing import Any

from ..hookspecs import hookimpl
from .export_lora import export_lora
from .plugins import plugins


@hookimpl
def sorsa_commands(app: Any) -> None:
    """The commands on saved adapters, and on this installation."""
    app.command("export-lora")(export_lora)
    app.command("plugins")(plugins)
