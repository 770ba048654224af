"""`sorsa doctor`: prints what `tools/doctor.py` found, and exits with 1 if something has to be repaired."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import typer

from .formatting import console

if TYPE_CHECKING:
    from rich.table import Table

    from sorsa_plugin.tools.doctor import Diagnosis


def doctor(as_json: bool = typer.Option(False, "--json", help="Print JSON instead of a table.")) -> None:
    """Check versions, PEFT's registration, plug-ins and device; exits with 1 where something has to be repaired."""
    from sorsa_plugin.tools.doctor import examine

    diagnosis = examine()
    if as_json:
        typer.echo(json.dumps(diagnosis.to_json(), indent=2))
    else:
        _print(diagnosis)
    if not diagnosis.healthy:
        raise typer.Exit(1)


def _print(diagnosis: Diagnosis) -> None:
    from rich.markup import escape

    table = _table("package", "installed", "supported", "what to do")
    for package in diagnosis.packages:
        todo = "" if package.in_range else package.command
        if todo and not package.problem:
            todo = f"optional: {todo}"
        row = (package.name, package.installed or "-", package.supported or "any", todo)
        table.add_row(*map(escape, row), style="bold red" if package.problem else None)
    page = console()
    page.print(table)
    registered = "yes" if diagnosis.registered else "no: PEFT's SORSA is not this package's"
    facts = [
        ("registered with PEFT", registered),
        ("known without an import", diagnosis.autoload),
        ("device", diagnosis.device),
    ]
    if diagnosis.conflict is not None:
        facts.append(("conflict", diagnosis.conflict))
    for name, value in facts:
        page.print(f"{escape(name)}: {escape(value)}", highlight=False, soft_wrap=True)
    print_plugins(diagnosis)


def print_plugins(diagnosis: Diagnosis) -> None:
    """Print the plug-ins: what each adds, and the traceback of each that failed."""
    table = _table("plug-in", "from", "hooks", "adapter types")
    for plugin in diagnosis.plugins:
        table.add_row(plugin.name, plugin.distribution, ", ".join(plugin.hooks), ", ".join(plugin.adapters))
    page = console()
    page.print(table)
    for broken in diagnosis.broken:
        page.print(f"{broken.name} of {broken.distribution} failed: {broken.error}", style="red", markup=False)
        page.print(broken.traceback, markup=False, highlight=False)


def _table(*headings: str) -> Table:
    """An empty table that breaks names where a terminal is narrow, and cuts none off."""
    from rich.table import Column, Table

    return Table(*(Column(heading, overflow="fold") for heading in headings))
