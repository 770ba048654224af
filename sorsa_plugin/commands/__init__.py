"""The package's own commands of the `sorsa` command line, one a file; each loads what it needs when it runs."""

from __future__ import annotations

from typing import Any

from ..hookspecs import hookimpl
from .doctor import doctor
from .export_lora import export_lora
from .inspect import inspect
from .merge import merge


@hookimpl
def sorsa_commands(app: Any) -> None:
    """The commands on saved adapters."""
    app.command("export-lora")(export_lora)
    app.command("merge")(merge)
    app.command("inspect")(inspect)
    app.command("doctor")(doctor)
