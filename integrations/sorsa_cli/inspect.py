"""`sorsa inspect`: prints the summary of a saved adapter."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import typer

from . import options
from .formatting import console, pair, size

if TYPE_CHECKING:
    from sorsa_plugin.tools.inspect_adapter import AdapterSummary


def inspect(
    adapter: options.Adapter,
    as_json: bool = typer.Option(False, "--json", help="Print JSON instead of a table."),
) -> None:
    """Show an adapter's options, gaps, singular values and size of change, from its files alone."""
    from sorsa_plugin.tools.inspect_adapter import inspect_adapter

    summary = inspect_adapter(adapter)
    if as_json:
        typer.echo(json.dumps(summary.to_json(), indent=2))
    else:
        _print(summary)


def _healthy() -> str:
    from sorsa_plugin.learning_rate import HEALTHY_GAP, UNHEALTHY_GAP

    return (
        f"Healthy: a mean gap up to {HEALTHY_GAP:g} (0 is orthonormal) that does not grow from checkpoint to "
        f"checkpoint. Above {UNHEALTHY_GAP:g} the learning rate is too high, or gamma too small (measured on one "
        "task). dS and change are 0 where nothing was trained."
    )


def _print(summary: AdapterSummary) -> None:
    from rich.box import SIMPLE
    from rich.table import Table

    page = console()
    config, layers = summary.config, summary.layers
    facts = Table.grid(padding=(0, 2))
    schedule = f", {config.resolved_reg_schedule}" if config.reg_update == "decoupled" else ""
    stored = f"stored as {config.storages}" if config.storages else "storage unknown"
    tied = [f"{name} to {layout[1]}" for name, layout in config.lora_layouts.items() if layout[0] == "tied"]
    tokens = [f"{count} rows of {name}" for name, count in summary.trained_tokens.items()]
    for name, value in {
        "base": f"{config.base_model_name_or_path or 'not named'}, {stored}",
        "rank": f"{config.r}" + (f", {config.rank_pattern}" if config.rank_pattern else ""),
        "regularizer": f"gamma {config.resolved_gamma:g}, {config.reg_update}{schedule}",
        "layers": f"{len(layers)}, {summary.trainable:,} trained values",
        "tied layers": ", ".join(tied) or "none",
        "whole tensors": ", ".join(summary.carried) or "none",
        "trained tokens": ", ".join(tokens) or "none",
        "file": f"{size(summary.bytes)}, factors in {', '.join(summary.dtypes)}",
        "gap": f"mean {sum(x.gap_U + x.gap_V for x in layers) / (2 * len(layers)):.3g}, "
        f"largest {max(max(x.gap_U, x.gap_V) for x in layers):.3g}",
        "change": f"{sum(x.change**2 for x in layers) ** 0.5:.3g} (Frobenius norm over all layers)",
        "fingerprint": f"{sum(x.fingerprint**2 for x in layers) ** 0.5:.5g} (norm over all layers)",
    }.items():
        facts.add_row(name, value)
    table = Table(
        caption="gap: ||P'P - I||, of experts the largest; S: range; dS: ||dS|| / ||S0||; change: ||L R'||",
        box=SIMPLE,
        pad_edge=False,
    )
    table.add_column("layer", overflow="fold", min_width=12)
    for heading in ("out x in", "r", pair("gap U", ", ", "V", page), "S", "dS", "change"):
        table.add_column(heading, justify="right", no_wrap=True)
    for x in layers:
        shape = f"{x.out_features} x {x.in_features}"
        table.add_row(
            x.name,
            pair(f"{x.matrices} x", " ", shape, page) if x.matrices > 1 else shape,
            str(x.rank),
            pair(f"{x.gap_U:.2g}", ", ", f"{x.gap_V:.2g}", page),
            pair(f"{x.S_min:.3g}", "..", f"{x.S_max:.3g}", page),
            f"{x.relative_dS:.2g}",
            f"{x.change:.2g}",
            style=None if x.finite else "bold red",
        )
    page.print(facts, table)
    page.print(_healthy(), highlight=False)
    broken = [x.name for x in layers if not x.finite]
    if broken:
        page.print(f"{len(broken)} layers hold NaN or infinity, the first of them {broken[0]}.", style="bold red")
