"""`sorsa convert-checkpoint`: makes one adapter of a sharded checkpoint, and prints its size."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sorsa_cli import options
from sorsa_cli.formatting import size


def add_commands(app: typer.Typer) -> None:
    """`sorsa convert-checkpoint`."""
    app.command("convert-checkpoint")(convert_checkpoint)


def convert_checkpoint(
    checkpoint: Annotated[Path, typer.Argument(help="A checkpoint-N directory with FSDP2's or DeepSpeed's pieces.")],
    output: options.Output,
    config: Path | None = typer.Option(
        None, help="Directory with the adapter_config.json; default: the checkpoint's, or the one around it."
    ),
    adapter: str = typer.Option("default", help="Name of the adapter, where several were trained."),
) -> None:
    """Write the adapter of a sharded checkpoint as a plain adapter directory, which loads on one process."""
    from .sharded_checkpoints import convert_checkpoint as convert

    report = convert(checkpoint, output, config=config, adapter_name=adapter)
    typer.echo(
        f"Adapter of {report.layers} layers from {report.written_by}'s pieces in {report.output}: {size(report.bytes)}."
    )
