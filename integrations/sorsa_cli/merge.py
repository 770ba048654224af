"""`sorsa merge`: merges, and prints what was merged, replaced, untied and left out."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from . import options
from .formatting import size


def merge(
    base: options.Base,
    adapter: Annotated[list[Path], typer.Option(help="Directory of a saved SORSA adapter; repeat it to add several.")],
    output: options.Output,
    safe: bool = typer.Option(False, "--safe", help="Look for NaN and infinity in what is merged."),
    revision: options.Revision = None,
) -> None:
    """Write the base model with one adapter or several merged in, as a plain model, one weight at a time."""
    from sorsa_plugin.tools.merge.merge_adapter import merge_adapter

    report = merge_adapter(base, adapter, output, safe=safe, revision=revision)
    shards = "1 file" if report.shards == 1 else f"{report.shards} files"
    typer.echo(f"Merged {len(report.merged)} layers into {report.output}: {shards} of weights, {size(report.bytes)}.")
    if report.replaced:
        typer.echo(f"Replaced {len(report.replaced)} tensors that the adapter holds in whole.")
    if report.with_trained_tokens:
        typer.echo(f"Replaced the rows of trained tokens in {', '.join(report.with_trained_tokens)}.")
    if report.untied:
        typer.echo(f"No longer tied, because only one of them was adapted: {', '.join(report.untied)}.")
    if report.left_out:
        typer.echo(f"Left out, because it holds unmerged weights: {', '.join(report.left_out)}.")
