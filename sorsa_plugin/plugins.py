"""The plug-in manager: built-ins and strangers go through the same hooks."""

from __future__ import annotations

from functools import lru_cache

import pluggy

from . import hookspecs
from .errors import PluginError
from .hookspecs import GROUP


@lru_cache(maxsize=1)
def manager() -> pluggy.PluginManager:
    """The process's plug-in manager, with this package's kinds and every installed plug-in registered.

    Raises:
        PluginError: an installed plug-in could not be imported.
    """
    from . import attachment, commands
    from .layers import KINDS

    plugins = pluggy.PluginManager(GROUP)
    plugins.add_hookspecs(hookspecs)
    for kind in KINDS:
        plugins.register(kind, kind.__name__)
    plugins.register(attachment, "sorsa_plugin.attachment")
    plugins.register(commands, "sorsa_plugin.commands")
    try:
        plugins.load_setuptools_entrypoints(GROUP)
    except Exception as error:
        raise PluginError(
            f"A plug-in in the entry-point group {GROUP!r} could not be loaded: {error!r}. Repair or uninstall the "
            "package that the traceback names."
        ) from error
    return plugins
