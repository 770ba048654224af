"""`sorsa export-lora` exports and reports, or ends with one sentence."""

from __future__ import annotations

import shutil

import pytest
from builders.saved import saved_adapter
from typer.testing import CliRunner

from sorsa_cli import build_app
from sorsa_plugin import export_lora


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Directory of a saved adapter of rank 3 on 14 layers; tests copy what they damage."""
    return saved_adapter(tmp_path_factory.mktemp("saved"))


def test_the_command_exports_and_reports(saved, tmp_path):
    run = CliRunner().invoke(build_app(), ["export-lora", str(saved), "-o", str(tmp_path / "lora")])
    assert run.exit_code == 0
    assert "LoRA of rank 6 (alpha 6, scale 1) for 14 layers" in run.output
    assert "Exact" in run.output
    run = CliRunner().invoke(build_app(), ["export-lora", str(saved), "-o", str(tmp_path / "small"), "--rank", "2"])
    assert run.exit_code == 0
    report = export_lora(saved, tmp_path / "again", rank=2)
    assert f"relative error {report.relative_error:.3g}" in run.output
    assert f"{report.relative_error:.3g}, truncated" in (tmp_path / "small" / "README.md").read_text()


def test_the_command_ends_with_the_error_in_one_sentence(saved, tmp_path):
    (tmp_path / "mine").write_text("")
    run = CliRunner().invoke(build_app(), ["export-lora", str(saved), "-o", str(tmp_path)])
    assert run.exit_code == 1
    assert "is not empty; expected a new or empty directory" in run.output
    assert "Traceback" not in run.output


def test_beside_writes_into_the_adapters_directory(saved, tmp_path):
    adapter = tmp_path / "adapter"
    shutil.copytree(saved, adapter)
    run = CliRunner().invoke(build_app(), ["export-lora", str(adapter), "--beside"])
    assert run.exit_code == 0, run.output
    assert (adapter / "lora" / "adapter_config.json").is_file()


@pytest.mark.parametrize("arguments", [[], ["--beside", "-o", "there"]])
def test_one_of_output_and_beside_is_needed(saved, arguments):
    run = CliRunner().invoke(build_app(), ["export-lora", str(saved), *arguments])
    assert run.exit_code == 2
    assert "give either --output DIR or --beside" in run.output
