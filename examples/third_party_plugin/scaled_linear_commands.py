"""The plug-in's command, `sorsa house-style`. `sorsa --help` imports this file, so nothing heavy is imported above."""

from __future__ import annotations

import typer

from sorsa_cli import options


def add_commands(app: typer.Typer) -> None:
    """What the entry-point group `sorsa_commands` names."""
    app.command("house-style")(house_style)


def house_style(rank: options.Rank = 4) -> None:
    """Print the lines that a recipe of our team's style has, with every default filled in."""
    from sorsa_plugin.extend import setup_adapter

    config = setup_adapter({"adapter": "house-style", "r": rank}).peft_config
    typer.echo(f"adapter: house-style\nr: {config.r}\nhouse-style: {{gamma: {config.resolved_gamma}}}")
