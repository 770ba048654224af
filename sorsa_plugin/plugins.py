"""The plug-in manager: built-ins and foreign plug-ins use the same hooks; knows the built-ins by name alone.

A foreign plug-in that cannot be loaded, or fails while it lists adapter types or adds commands, is reported and left
out. An error in a layer's or an engine's hook reaches the caller, because the result cannot be made without it.
"""

from __future__ import annotations

import logging
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from typing import Any

import pluggy

from .errors import PluginError

GROUP = "sorsa_plugin"
"""The entry-point group under which installed plug-ins are found."""

COMMANDS = "sorsa_commands"
"""The entry-point group of functions that add commands to `sorsa`, a typer app, and import nothing heavy to do so."""

hookspec = pluggy.HookspecMarker(GROUP)
hookimpl = pluggy.HookimplMarker(GROUP)

HOOKSPECS = "sorsa_plugin.hookspecs"
"""The module that declares the hooks."""

BUILT_INS = (
    "sorsa_plugin.layers.kinds.linear",
    "sorsa_plugin.layers.kinds.embedding",
    "sorsa_plugin.layers.kinds.conv",
    "sorsa_plugin.layers.kinds.attention",
    "sorsa_plugin.regularizer.engines",
    "sorsa_plugin.recipes.sorsa",
    "sorsa_plugin.recipes.peft_methods",
)
"""This package's own plug-ins, as strings that are loaded when a hook is first called. They stand above this file,
which must not import them."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class BrokenPlugin:
    """A plug-in that could not be loaded or failed in a hook."""

    name: str
    distribution: str
    """Name and version of the package that the plug-in came from."""
    error: str
    traceback: str


broken: dict[str, BrokenPlugin] = {}
"""Plug-ins that failed, by name; each was logged with its traceback when it happened."""

distributions: dict[str, str] = {}
"""{installed plug-in: name and version of the package that it came from}"""


@lru_cache(maxsize=1)
def manager() -> pluggy.PluginManager:
    """The process's plug-in manager, with this package's own plug-ins and every installed one registered."""
    plugins = pluggy.PluginManager(GROUP)
    plugins.add_hookspecs(import_module(HOOKSPECS))
    for name in BUILT_INS:
        plugins.register(import_module(name), name)
    for entry in entry_points(group=GROUP):
        distributions[entry.name] = origin(entry)
        try:
            plugin = entry.load()
            plugins.register(plugin, entry.name)
            _require_known_hooks(plugins, plugin)
        except Exception as error:
            if plugins.has_plugin(entry.name):
                plugins.unregister(name=entry.name)
            report(entry.name, error)
    return plugins


def origin(entry: EntryPoint) -> str:
    """Name and version of the package that an entry point came from."""
    return f"{entry.dist.name} {entry.dist.version}" if entry.dist else "unknown"


def _require_known_hooks(plugins: pluggy.PluginManager, plugin: Any) -> None:
    callers = plugins.get_hookcallers(plugin) or []
    unknown = [caller.name for caller in callers if not caller.has_spec()]
    if unknown:
        other = f" Commands come by an entry point of the group {COMMANDS}." if COMMANDS in unknown else ""
        known = [name for name in vars(import_module(HOOKSPECS)) if name.startswith("sorsa_")]
        raise PluginError(
            f"It implements {', '.join(unknown)}, which nobody calls; expected some of {', '.join(known)}.{other}"
        )


def answers(hook: str, **arguments: Any) -> Iterator[tuple[str, Any]]:
    """Plug-in name and answer of every plug-in that implements a hook. One that fails is reported and left out."""
    for implementation in getattr(manager().hook, hook).get_hookimpls():
        try:
            yield implementation.plugin_name, implementation.function(**arguments)
        except Exception as error:
            report(implementation.plugin_name, error)


def broken_note() -> str:
    """A sentence that names the plug-ins that failed, for messages about unknown words; empty if none failed."""
    if not broken:
        return ""
    names = ", ".join(f"{plugin.name} of {plugin.distribution} ({plugin.error})" for plugin in broken.values())
    return f" Plug-ins that could not be loaded: {names}. `sorsa doctor` shows their tracebacks."


def report(name: str, error: Exception, distribution: str | None = None) -> None:
    """Note and log that a plug-in could not be loaded, or failed where it can be left out.

    Args:
        name: of the plug-in.
        error: what it raised.
        distribution: name and version of its package; default: what the manager knows.
    """
    trace = "".join(traceback.format_exception(error))
    distribution = distribution or distributions.get(name, "this process")
    broken[name] = BrokenPlugin(name, distribution, f"{type(error).__name__}: {error}", trace)
    logger.warning(
        "The plug-in %s of %s failed and is left out; everything else works. Repair or uninstall it.\n%s",
        name, distribution, trace,
    )  # fmt: skip
