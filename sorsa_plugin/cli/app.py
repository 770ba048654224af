"""The `sorsa` command: an empty typer app that plug-ins fill."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

import typer
import typer.core
from safetensors import SafetensorError

from ..errors import SORSAError
from ..plugins import answers


class Commands(typer.core.TyperGroup):
    """Prints errors of this package and of the disk as sentences, without a traceback, and exits with 1."""

    def invoke(self, ctx: Any) -> Any:
        """Run a command.

        Raises:
            typer.Exit: with code 1, after the command raised an error of this package or of the disk.
        """
        try:
            return super().invoke(ctx)
        except BrokenPipeError:  # `sorsa ... | head`: typer ends it without a message
            raise
        except (SORSAError, OSError, SafetensorError) as error:
            typer.echo(f"Error: {error}", err=True)
            raise typer.Exit(1) from error


def build_app() -> typer.Typer:
    """The command line with every plug-in's commands. Its `--version` raises typer.Exit once the version is printed."""
    app = typer.Typer(
        name="sorsa",
        cls=Commands,
        help="SORSA fine-tuning as a PEFT adapter type.",
        no_args_is_help=True,
        add_completion=False,
    )

    @app.callback(invoke_without_command=True)
    def root(show_version: bool = typer.Option(False, "--version", help="Print the version and exit.")) -> None:
        if show_version:
            typer.echo(version("sorsa-plugin"))
            raise typer.Exit

    list(answers("sorsa_commands", app=app))
    return app


def main() -> None:
    """Entry point of the console script."""
    build_app()()
