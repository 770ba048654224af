"""Adds `sorsa quickstart` to the command line; loads nothing heavy until it runs."""

from __future__ import annotations

from pathlib import Path

import typer


def add_commands(app: typer.Typer) -> None:
    """`sorsa quickstart`."""
    app.command("quickstart")(quickstart)


def quickstart(
    adapter: str = typer.Option("sorsa", help="sorsa, or lora for comparison."),
    steps: int = typer.Option(150, min=1, help="Optimizer steps."),
    seed: int = typer.Option(0, min=0, help="The same seed gives the same numbers."),
    gamma: float | None = typer.Option(None, help="Rate of the orthonormal regularizer; default: the method's."),
    output: Path = typer.Option(Path("runs/quickstart"), help="Where adapter/ and report.json are written."),
    plot: Path | None = typer.Option(None, help="Write a chart of loss and gaps to this PNG file."),
) -> None:
    """Fine-tune the embedded base model on a task it cannot do, and check everything that matters on the way."""
    from .run import run

    run(adapter=adapter, steps=steps, seed=seed, gamma=gamma, output=output, plot=plot)
