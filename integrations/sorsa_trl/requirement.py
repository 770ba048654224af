"""Says how to install TRL where it is missing."""

from __future__ import annotations

from importlib.util import find_spec

from sorsa_plugin.errors import MissingPackageError


def require_trl() -> None:
    """Check that TRL is installed.

    Raises:
        MissingPackageError: TRL is not installed; the message has the pip command.
    """
    if find_spec("trl") is None:
        raise MissingPackageError("TRL is not installed; this needs it. Run: pip install 'sorsa-plugin[trl]'")
