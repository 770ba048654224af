"""Says how to repair an installation in which the plug-in cannot be imported; imports nothing that can fail.

Axolotl's plug-in manager logs an ImportError and goes on without the plug-in. The recipe would then fail because nobody
knows its adapter. So the error raised here is no ImportError.
"""

from __future__ import annotations

from typing import Any

PIP_COMMAND = "pip install --upgrade 'sorsa-plugin[axolotl]'"


class BrokenInstallationError(RuntimeError):
    """A package that the plug-in needs is missing, or has another version than the plug-in works with."""


def import_plugin() -> Any:
    """The plug-in's class.

    Raises:
        BrokenInstallationError: a package that it imports is missing, or has another version than expected; the message
            has the pip command.
    """
    try:
        from .plugin import SORSAPlugin
    except ImportError as error:
        raise BrokenInstallationError(
            f"sorsa_axolotl.SORSAPlugin cannot be imported: {error}. Its packages are missing or have other versions "
            f"than expected. Run: {PIP_COMMAND}"
        ) from error
    return SORSAPlugin
