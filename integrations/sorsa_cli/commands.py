"""The package's own commands, one a file. Each loads what it needs when it runs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .adapters import adapters
from .advise import advise
from .analyze import analyze
from .doctor import doctor
from .export_lora import export_lora
from .init import init
from .inspect import inspect
from .merge import merge
from .plan import plan
from .plugins import plugins

if TYPE_CHECKING:
    import typer


def add_commands(app: typer.Typer) -> None:
    """The commands on base models, on saved adapters, and on this installation."""
    app.command("plan")(plan)
    app.command("advise")(advise)
    app.command("init")(init)
    app.command("inspect")(inspect)
    app.command("analyze")(analyze)
    app.command("merge")(merge)
    app.command("export-lora")(export_lora)
    app.command("adapters")(adapters)
    app.command("plugins")(plugins)
    app.command("doctor")(doctor)
