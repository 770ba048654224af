"""Adds `sorsa llamafactory` to the command line; loads nothing heavy until it runs."""

from __future__ import annotations

import typer

ANY_ARGUMENTS = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}

HELP = """\
Usage: sorsa llamafactory COMMAND [RECIPE.yaml] [KEY=VALUE]...

llamafactory-cli, whose recipes may say:

  finetuning_type: sorsa
  lora_rank: 16
  lora_target: all
  sorsa: {gamma: 4.0e-4, learning_rate: 1.0e-3}     # optional

COMMAND is one of llamafactory-cli's: train, export, chat, api, webchat.
LLaMA-Factory is installed by: pip install --no-deps llamafactory==0.9.5"""


def add_commands(app: typer.Typer) -> None:
    """`sorsa llamafactory`."""
    app.command("llamafactory", context_settings=ANY_ARGUMENTS, add_help_option=False)(llamafactory)


def llamafactory(context: typer.Context) -> None:
    """LLaMA-Factory's commands, with `finetuning_type: sorsa`."""
    if not context.args or {"-h", "--help"} & set(context.args[:1]):
        typer.echo(HELP)
        return
    from .launch import launch

    launch(context.args)
