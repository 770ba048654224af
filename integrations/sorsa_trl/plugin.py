"""Adds `sorsa sft` and `sorsa dpo` to the command line; loads nothing heavy until they run."""

from __future__ import annotations

from typing import Any

import typer

from sorsa_plugin.extend import hookimpl

ANY_ARGUMENTS = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}


@hookimpl
def sorsa_commands(app: Any) -> None:
    """`sorsa sft` and `sorsa dpo`."""
    app.command("sft", context_settings=ANY_ARGUMENTS, add_help_option=False)(sft)
    app.command("dpo", context_settings=ANY_ARGUMENTS, add_help_option=False)(dpo)


def sft(context: typer.Context) -> None:
    """Supervised fine-tuning: a recipe or arguments of `trl sft`, and `adapter:`."""
    from .launch import launch

    launch("sft", context.args)


def dpo(context: typer.Context) -> None:
    """Direct preference optimisation: a recipe or arguments of `trl dpo`, and `adapter:`."""
    from .launch import launch

    launch("dpo", context.args)
