"""`sorsa export-lora`: exports, and prints rank, size and error."""

from __future__ import annotations

from pathlib import Path

import typer

from . import options
from .formatting import size


def export_lora(
    adapter: options.Adapter,
    output: Path | None = typer.Option(None, "--output", "-o", help="Directory to make; it may exist and be empty."),
    beside: bool = typer.Option(
        False, "--beside", help='Write into the adapter\'s own directory, under "lora", and replace an earlier export.'
    ),
    rank: int | None = typer.Option(None, help="Truncate to this rank; default: the exact LoRA, of rank 2r."),
) -> None:
    """Write an adapter as a plain LoRA, which PEFT, vLLM, TGI and llama.cpp load without this package."""
    from sorsa_plugin.tools.export_lora import export_lora as export
    from sorsa_plugin.tools.lora_beside import export_beside

    if (output is None) != beside:
        raise typer.BadParameter("give either --output DIR or --beside")
    report = export(adapter, output, rank=rank) if output is not None else export_beside(adapter, rank=rank)
    typer.echo(
        f"LoRA of rank {report.rank} (alpha {report.rank}, scale 1) for {len(report.layers)} layers in "
        f"{report.output}: {size(report.bytes)}."
    )
    if report.relative_error:
        worst = max(report.layers, key=lambda layer: layer.relative_error)
        typer.echo(
            f"Truncated: relative error {report.relative_error:.3g} of the change (Frobenius norm), the smallest "
            f"possible at this rank; at worst {worst.relative_error:.3g}, in {worst.name}."
        )
    else:
        typer.echo("Exact: nothing was truncated.")
