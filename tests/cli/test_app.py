"""An error of the disk ends a command with its sentence, without a traceback."""

from __future__ import annotations

import pytest
from safetensors import SafetensorError
from typer.testing import CliRunner

from sorsa_cli import build_app


@pytest.mark.parametrize(
    ("error", "output"),
    [
        (OSError(28, "No space left on device", "out/file"), "Error: [Errno 28] No space left on device: 'out/file'\n"),
        (SafetensorError("I/O error: No space left on device"), "Error: I/O error: No space left on device\n"),
        (BrokenPipeError(32, "Broken pipe"), ""),  # of `sorsa write | head`
    ],
)
def test_an_error_of_the_disk_ends_a_command_without_a_traceback(error: Exception, output: str) -> None:
    app = build_app()

    @app.command()
    def write() -> None:
        raise error

    result = CliRunner().invoke(app, ["write"])
    assert (result.exit_code, result.output) == (1, output)
    assert isinstance(result.exception, SystemExit)
