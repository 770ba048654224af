"""Runs llamafactory-cli with SORSA in it."""

from __future__ import annotations

import os
import sys

from .requirement import require_llamafactory


def load() -> None:
    """Load LLaMA-Factory and teach it the word.

    Raises:
        MissingPackageError: it is not installed.
    """
    require_llamafactory()
    # 0.9.5 asks for PEFT 0.18, where SORSA needs 0.20; what we use of both is tested together
    os.environ.setdefault("DISABLE_VERSION_CHECK", "1")
    from .llamafactory_compat import patch

    patch()


def launch(arguments: list[str]) -> None:
    """llamafactory-cli with these arguments, in this process or in those that it starts.

    Raises:
        MissingPackageError: LLaMA-Factory is not installed.
        AdapterOptionsError, ForeignAdapterError: see `recipe.py`.
    """
    load()
    from .llamafactory_compat import launch as launch_cli

    sys.argv = ["llamafactory-cli", *arguments]
    launch_cli()
