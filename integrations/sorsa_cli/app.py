"""The `sorsa` command: a typer app with this package's commands and those of plug-ins."""

from __future__ import annotations

import sys
from importlib.metadata import entry_points, version
from typing import Any

import typer
import typer.core
from safetensors import SafetensorError

from .commands import add_commands

COMMANDS = "sorsa_commands"
"""The entry-point group of functions that add commands to a typer app. `sorsa --help` imports their modules."""

PACKAGE = "sorsa-plugin"


class Commands(typer.core.TyperGroup):
    """The commands. An error of this package or of the disk is printed as a sentence, and the exit code is 1."""

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """The first sentence of each command in full; click cuts it off after 45 letters."""
        names = self.list_commands(ctx)
        with formatter.section("Commands"):
            formatter.write_dl([(name, self.commands[name].get_short_help_str(limit=200)) for name in names])

    def invoke(self, ctx: Any) -> Any:
        """Run a command.

        Raises:
            typer.Exit: with code 1, after the command raised an error of this package or of the disk.
        """
        try:
            return super().invoke(ctx)
        except BrokenPipeError:  # `sorsa ... | head`: typer ends it without a message
            raise
        except Exception as error:
            if not _is_a_sentence(error):
                raise
            typer.echo(f"Error: {error}", err=True)
            raise typer.Exit(1) from error


def _is_a_sentence(error: Exception) -> bool:
    errors = sys.modules.get("sorsa_plugin.errors")  # there already, if it is what was raised
    ours = errors is not None and isinstance(error, errors.SORSAError)
    return ours or isinstance(error, (OSError, SafetensorError))


def build_app() -> typer.Typer:
    """The command line with every plug-in's commands. Its `--version` raises typer.Exit once the version is printed."""
    app = typer.Typer(
        name="sorsa",
        cls=Commands,
        help="SORSA fine-tuning as a PEFT adapter type.",
        no_args_is_help=True,
        add_completion=False,
        rich_markup_mode=None,  # plain text wraps names, and rich cuts them off in a narrow terminal
    )

    @app.callback(invoke_without_command=True)
    def root(show_version: bool = typer.Option(False, "--version", help="Print the version and exit.")) -> None:
        if show_version:
            typer.echo(version(PACKAGE))
            raise typer.Exit

    add_commands(app)
    for entry in entry_points(group=COMMANDS):
        try:
            entry.load()(app)
        except Exception as error:
            from sorsa_plugin.plugins import origin, report

            report(entry.name, error, origin(entry))
    return app


def main() -> None:
    """Entry point of the console script."""
    build_app()()
