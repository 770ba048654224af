"""Says how to install TRL where it is missing."""

from __future__ import annotations

from importlib.util import find_spec

from sorsa_plugin.errors import MissingPackageError


def require_trl() -> None:
    """Nothing, where TRL is installed.

    Raises:
        MissingPackageError: it is not; the message has the pip command.
    """
    if find_spec("trl") is None:
        raise MissingPackageError("TRL is not installed; this needs it. Run: pip install 'sorsa-plugin[trl]'")
