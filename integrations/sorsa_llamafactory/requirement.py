"""Says how to install LLaMA-Factory where it is missing."""

from __future__ import annotations

from importlib.util import find_spec

from sorsa_plugin.errors import MissingPackageError


def require_llamafactory() -> None:
    """Check that LLaMA-Factory is installed.

    Raises:
        MissingPackageError: it is not installed; the message has the pip command.
    """
    if find_spec("llamafactory") is None:
        raise MissingPackageError(
            "LLaMA-Factory is not installed; this needs it. Its 0.9.5 asks for an older PEFT than SORSA runs on, so "
            "leave the dependencies out. Run: pip install --no-deps llamafactory==0.9.5"
        )
