"""The `sorsa` command: a typer app with this package's commands and those of plug-ins."""

from __future__ import annotations

import sys
from importlib.metadata import EntryPoint, entry_points, version
from typing import Any

import typer
import typer.core
import typer.main
from safetensors import SafetensorError

from .commands import add_commands

COMMANDS = "sorsa_commands"
"""The entry-point group of functions that add commands to a typer app. `sorsa --help` imports their modules."""

PLUGINS = "sorsa_plugin"
"""The entry-point group of plug-ins, whose hook `sorsa_commands` adds commands too. They import torch."""

PACKAGE = "sorsa-plugin"


class Commands(typer.core.TyperGroup):
    """The commands. Those of the hook are looked for only where the others do not have a name, or all are listed.

    Prints errors of this package and of the disk as sentences, without a traceback, and exits with 1.
    """

    hook_asked = False

    def list_commands(self, ctx: Any) -> list[str]:
        """The names of all commands."""
        self._ask_hook()
        return super().list_commands(ctx)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """The command of a name, or None."""
        if cmd_name not in self.commands:
            self._ask_hook()
        return super().get_command(ctx, cmd_name)

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """The first sentence of each command in full; click cuts it off after 45 letters."""
        names = self.list_commands(ctx)
        with formatter.section("Commands"):
            formatter.write_dl([(name, self.commands[name].get_short_help_str(limit=200)) for name in names])

    def _ask_hook(self) -> None:
        if self.hook_asked:
            return
        self.hook_asked = True
        if PLUGINS not in sys.modules and not any(map(_foreign, entry_points(group=PLUGINS))):
            return
        from sorsa_plugin.plugins import answers

        app = typer.Typer(rich_markup_mode=None)
        list(answers("sorsa_commands", app=app))
        if app.registered_commands or app.registered_groups:
            for name, command in typer.main.get_group(app).commands.items():
                self.commands.setdefault(name, command)

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


def _foreign(entry: EntryPoint) -> bool:
    """Whether a plug-in came with another package. Ours add their commands through `COMMANDS`."""
    return entry.dist is None or entry.dist.name != PACKAGE


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
