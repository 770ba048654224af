"""Adds `sorsa sft` and `sorsa dpo` to the command line; loads nothing heavy until they train."""

from __future__ import annotations

from dataclasses import fields

import typer

from sorsa_transformers.arguments import AdapterArguments

ANY_ARGUMENTS = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}

USAGE = """\
Usage: sorsa {command} --config recipe.yaml [--OPTION VALUE]...
"""

EXAMPLE = """
Keys of the recipe are options too, and the command line wins:

  sorsa {command} --model_name_or_path MODEL --dataset_name DATA --output_dir RUN \\
    --adapter sorsa --r 16

"""

MORE = """
The model, the data and training take every option of `trl {command}`, which
`trl {command} --help` lists. TRL is installed by: pip install "sorsa-plugin[trl]"
The number of processes and the like: every option of `accelerate launch`."""


def add_commands(app: typer.Typer) -> None:
    """`sorsa sft` and `sorsa dpo`."""
    app.command("sft", context_settings=ANY_ARGUMENTS, add_help_option=False)(sft)
    app.command("dpo", context_settings=ANY_ARGUMENTS, add_help_option=False)(dpo)


def sft(context: typer.Context) -> None:
    """Supervised fine-tuning: a recipe or arguments of `trl sft`, and `adapter:`."""
    _run("sft", context)


def dpo(context: typer.Context) -> None:
    """Direct preference optimisation: a recipe or arguments of `trl dpo`, and `adapter:`."""
    _run("dpo", context)


def _run(command: str, context: typer.Context) -> None:
    if {"-h", "--help"} & set(context.args):
        _help(command, context)
        return
    from .launch import launch

    launch(command, context.args)


def _help(command: str, context: typer.Context) -> None:
    formatter = context.make_formatter()
    formatter.write(USAGE.format(command=command) + "\n")
    formatter.write_text(context.command.help or "")
    formatter.write(EXAMPLE.format(command=command))
    with formatter.section("The adapter"):
        formatter.write_dl([(f"--{item.name}", item.metadata["help"]) for item in fields(AdapterArguments)])
    formatter.write(MORE.format(command=command))
    typer.echo(formatter.getvalue())
