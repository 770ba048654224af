"""`sorsa analyze`: measures, saves, and prints a table of the means."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import typer

from . import options
from .formatting import console, pair

if TYPE_CHECKING:
    from rich.console import Console

    from sorsa_plugin.tools.analysis.analyze import Analysis


def analyze(
    base: options.Base,
    output: Path | None = typer.Option(None, "--output", "-o", help="Directory to make for tables and charts."),
    html: Path | None = typer.Option(None, help="One page to make, with tables, charts and what they mean inside."),
    adapter: list[Path] = typer.Option([], help="A PEFT adapter of any type, or a trained model; may be repeated."),
    checkpoints: list[Path] = typer.Option([], help="A run with checkpoint-N directories; may be repeated."),
    modules: str | None = typer.Option(None, help="Only modules whose names match this regular expression."),
    top: int | None = typer.Option(None, help="Compare this many singular triplets of each weight; default: all."),
    degenerate: float = typer.Option(
        1e-6, help="Neighbours closer than this (relative to the largest) are compared as subspaces."
    ),
    plots: bool = typer.Option(True, help="Draw charts (needs matplotlib)."),
    task_type: options.TaskType = "CAUSAL_LM",
    revision: options.Revision = None,
) -> None:
    """Measure what training did to singular values and vectors, as the paper does: tables, charts, a page."""
    from sorsa_plugin.files.atomic_directory import appearing_whole
    from sorsa_plugin.files.atomic_file import write_whole
    from sorsa_plugin.tools.analysis.analyze import analyze as measure
    from sorsa_plugin.tools.analysis.charts import require_matplotlib, save_plots
    from sorsa_plugin.tools.analysis.report import html_report

    directory, page = _free_places(output, html)
    if plots:
        require_matplotlib()
    result = measure(
        base,
        adapter,
        runs=checkpoints,
        modules=modules,
        top=top,
        degenerate=degenerate,
        task_type=options.task(task_type),
        revision=revision,
    )
    if directory is not None:
        with appearing_whole(directory) as partial:
            result.save(partial)
            if plots:
                save_plots(result, partial)
    if page is not None:
        write_whole(page, html_report(result, charts=plots))
    _show(result)
    if directory is not None:
        typer.echo(f"layers.csv, summary.csv, analysis.json{' and charts' if plots else ''} are in {output}.")
    if page is not None:
        typer.echo(f"The page is {html}.")


def _free_places(output: Path | None, html: Path | None) -> tuple[Path | None, Path | None]:
    """Where the directory and the page will be.

    Raises:
        OutputExistsError: one of them is taken, or cannot be made.
        SORSAConfigError: neither was asked for.
    """
    from sorsa_plugin.errors import OutputExistsError, SORSAConfigError
    from sorsa_plugin.files.atomic_directory import output_path, refuse_occupied
    from sorsa_plugin.files.atomic_file import refuse_existing

    if output is None and html is None:
        raise SORSAConfigError("There is no place for the results; give a directory (-o), a page (--html), or both.")
    directory, page = output and output_path(output), html and output_path(html)
    if directory is not None:
        refuse_occupied(directory)
    if page is not None:
        refuse_existing(page)
        if directory is not None and page in (directory, *directory.parents):
            raise OutputExistsError(f"--html {html} is where --output {output} needs a directory. Choose another.")
    return directory, page


def _show(analysis: Analysis) -> None:
    from rich.box import SIMPLE
    from rich.table import Table

    from sorsa_plugin.tools.analysis.report import HEALTHY

    page = console()
    layers = max(row.layers for row in analysis.summaries())
    page.print(f"Change of the weights of {analysis.base}, mean of {layers}", style="italic", highlight=False)
    table = Table(box=SIMPLE)
    table.add_column("run", overflow="fold", min_width=8)
    for name in (
        "step",
        "dSigma",
        "dD",
        "|dW|/|W|",
        pair("cond.", " ", "merged", page),
        pair("cond.", " ", "W_p", page),
    ):
        table.add_column(name, justify="right", no_wrap=True)
    rows = analysis.summaries()
    for row, following in zip(rows, [*rows[1:], None], strict=True):
        table.add_row(
            row.run,
            "-" if row.step is None else str(row.step),
            f"{row.d_sigma:.3g}",
            f"{row.d_direction:.3g}",
            f"{row.relative_change:.3g}",
            _change(row.condition_before, row.condition_after, page),
            _change(row.principal_condition_before, row.principal_condition_after, page),
            end_section=following is not None and following.run != row.run,
        )
    page.print(table)
    page.print(HEALTHY, highlight=False)


def _change(before: float | None, after: float | None, page: Console) -> str:
    if after is None:
        return "-"
    return pair("-" if before is None else f"{before:.3g}", " > ", f"{after:.3g}", page)
