"""`sorsa plugins`: a part of `sorsa doctor`, under its old name for one more release."""

from __future__ import annotations

import json

import typer


def plugins(as_json: bool = typer.Option(False, "--json", help="Print JSON instead of a table.")) -> None:
    """List plug-ins; `sorsa doctor` does that too, and takes the place of this command."""
    from sorsa_plugin.tools.doctor import examine

    from .doctor import print_plugins

    typer.echo("`sorsa plugins` is a part of `sorsa doctor` now, and goes with the next release.", err=True)
    diagnosis = examine()
    if as_json:
        typer.echo(json.dumps(diagnosis.plugins_to_json(), indent=2))
    else:
        print_plugins(diagnosis)
