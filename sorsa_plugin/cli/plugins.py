"""`sorsa plugins`: what is loaded, what it adds, and what could not be loaded."""

from __future__ import annotations

import json

import typer


def plugins(as_json: bool = typer.Option(False, "--json", help="Print JSON instead of a table.")) -> None:
    """List the loaded plug-ins, the adapter types they add, and those that failed, with their tracebacks."""
    from ..plugins import answers, broken, distributions, manager

    host = manager()
    offered = {name: [kind.name for kind in kinds] for name, kinds in answers("sorsa_adapters")}
    loaded = [
        {
            "name": name,
            "distribution": distributions.get(name, "sorsa-plugin"),
            "hooks": sorted(caller.name for caller in host.get_hookcallers(plugin) or []),
            "adapters": offered.get(name, []),
        }
        for name, plugin in host.list_name_plugin()
        if name not in broken and plugin is not None
    ]
    failed = [vars(plugin) for plugin in broken.values()]
    if as_json:
        typer.echo(json.dumps({"plugins": loaded, "broken": failed}, indent=2))
        return
    from rich.table import Table

    from .formatting import console

    table = Table("plug-in", "from", "hooks", "adapter types")
    for plugin in loaded:
        table.add_row(*(value if isinstance(value, str) else ", ".join(value) for value in plugin.values()))
    page = console()
    page.print(table)
    for plugin in failed:
        page.print(f"{plugin['name']} of {plugin['distribution']} failed: {plugin['error']}", style="red", markup=False)
        page.print(plugin["traceback"], markup=False, highlight=False)
