"""An error of the disk ends a command with its sentence, without a traceback."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import typer
from safetensors import SafetensorError
from typer.testing import CliRunner

from sorsa_cli import build_app
from sorsa_plugin import (
    hookimpl,
)
from sorsa_plugin.plugins import manager


@contextmanager
def registered(plugin: object, name: str | None = None) -> Iterator[None]:
    manager().register(plugin, name)
    try:
        yield
    finally:
        manager().unregister(plugin)


@pytest.mark.parametrize(
    ("error", "output"),
    [
        (OSError(28, "No space left on device", "out/file"), "Error: [Errno 28] No space left on device: 'out/file'\n"),
        (SafetensorError("I/O error: No space left on device"), "Error: I/O error: No space left on device\n"),
        (BrokenPipeError(32, "Broken pipe"), ""),  # of `sorsa write | head`
    ],
)
def test_an_error_of_the_disk_ends_a_command_without_a_traceback(error: Exception, output: str) -> None:
    class Plugin:
        @staticmethod
        @hookimpl
        def sorsa_commands(app: typer.Typer) -> None:
            @app.command()
            def write() -> None:
                raise error

    with registered(Plugin):
        result = CliRunner().invoke(build_app(), ["write"])
    assert (result.exit_code, result.output) == (1, output)
    assert isinstance(result.exception, SystemExit)
