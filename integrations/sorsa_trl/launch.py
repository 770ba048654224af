"""Starts the training processes through `accelerate launch`, as `trl sft` does."""

from __future__ import annotations

from sorsa_plugin import setup_adapter

from .recipe import RecipeParser
from .trl_compat import launch_command, launch_command_parser, resolve_accelerate_config_argument


def launch(command: str, arguments: list[str]) -> None:
    """Check the recipe, then run it in one or several processes. So its errors come at once, and only once.

    Args:
        command: "sft" or "dpo".
        arguments: of the command line, with `--config recipe.yaml`.

    Raises:
        AdapterOptionsError: see `recipe.py` and `sorsa_plugin.setup_adapter`.
        SystemExit: the training failed; stderr has the reason.
    """
    recipe = RecipeParser(command).parse(arguments)
    recipe.require_model()
    setup_adapter(recipe.adapter)
    launching = resolve_accelerate_config_argument([*recipe.from_file, *recipe.from_command_line])
    training = _without(arguments, recipe.from_command_line)
    options = launch_command_parser().parse_args(
        ["--quiet", *launching, "--module", "sorsa_trl.train", command, *training]
    )
    launch_command(options)


def _without(arguments: list[str], taken: list[str]) -> list[str]:
    """The arguments less those in `taken`, which are some of them in the same order."""
    kept, left = [], list(taken)
    for argument in arguments:
        if left and argument == left[0]:
            left.pop(0)
        else:
            kept.append(argument)
    return kept
