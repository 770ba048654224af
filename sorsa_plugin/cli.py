"""The `sorsa` command: an empty typer app that plug-ins fill."""

from __future__ import annotations

from importlib.metadata import version

import typer

from .plugins import manager


def build_app() -> typer.Typer:
    """The command line with every plug-in's commands."""
    app = typer.Typer(
        name="sorsa", help="SORSA fine-tuning as a PEFT adapter type.", no_args_is_help=True, add_completion=False
    )

    @app.callback(invoke_without_command=True)
    def root(show_version: bool = typer.Option(False, "--version", help="Print the version and exit.")) -> None:
        if show_version:
            typer.echo(version("sorsa-plugin"))
            raise typer.Exit

    manager().hook.sorsa_commands(app=app)
    return app


def main() -> None:
    """Entry point of the console script."""
    build_app()()
