"""`sorsa export-lora`: exports, and prints rank, size and error."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer

from . import options
from .formatting import size


def export_lora(
    adapter: options.Adapter,
    output: Path | None = typer.Option(None, "--output", "-o", help="Directory to make; it may exist and be empty."),
    beside: bool = typer.Option(
        False, "--beside", help='Write into the adapter\'s own directory, under "lora", and replace an earlier export.'
    ),
    rank: str | None = typer.Option(
        None, help='Truncate to this rank, or "auto": the smallest within --error. Default: exact, rank 2r.'
    ),
    error: float | None = typer.Option(None, help="With --rank auto: the largest relative error, such as 1e-3."),
    dtype: str = typer.Option("fp32", help="Of the LoRA: fp32, fp16 or bf16, which halve the file."),
) -> None:
    """Write an adapter as a plain LoRA, which PEFT, vLLM, TGI and llama.cpp load without this package."""
    from sorsa_plugin.tools.export_lora import export_lora as export
    from sorsa_plugin.tools.lora_beside import export_beside

    if (output is None) != beside:
        raise typer.BadParameter("give either --output DIR or --beside")
    chosen: Any = int(rank) if rank is not None and rank.isdecimal() else rank
    if output is not None:
        report = export(adapter, output, rank=chosen, error=error, dtype=dtype)
    else:
        report = export_beside(adapter, rank=chosen, error=error, dtype=dtype)
    typer.echo(
        f"LoRA of rank {report.rank} (alpha {report.rank}, scale 1) for {len(report.layers)} layers in "
        f"{report.output}: {size(report.bytes)}."
    )
    if report.lossy:
        worst = max(report.layers, key=lambda layer: layer.relative_error)
        typer.echo(
            f"{report.lossy.capitalize()}: relative error {report.relative_error:.3g} of the change (Frobenius norm); "
            f"at worst {worst.relative_error:.3g}, in {worst.name}."
        )
    else:
        typer.echo("Exact: nothing was truncated or rounded.")
