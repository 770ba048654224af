"""`sorsa merge` merges and reports."""

from __future__ import annotations

from typer.testing import CliRunner

from sorsa_cli import build_app


def test_the_command_merges_and_reports(sharded_llama, adapter, tmp_path):
    options = [
        "merge",
        "--base",
        str(sharded_llama),
        "--adapter",
        str(adapter),
        "-o",
        str(tmp_path / "merged"),
        "--safe",
    ]
    run = CliRunner().invoke(build_app(), options)
    assert run.exit_code == 0
    assert "Merged 14 layers" in run.output
    again = CliRunner().invoke(build_app(), options)
    assert again.exit_code == 1
    assert "is not empty; expected a new or empty directory" in again.output
    assert "Traceback" not in again.output
