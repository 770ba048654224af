"""`sorsa doctor` prints its diagnosis as a table or as JSON."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from sorsa_cli import build_app
from sorsa_plugin.tools.doctor import examine


def test_json_is_the_diagnosis(monkeypatch):
    run = CliRunner().invoke(build_app(), ["doctor", "--json"])
    assert run.exit_code == 0
    assert json.loads(run.stdout) == json.loads(json.dumps(examine().to_json()))


def test_the_table_names_every_package():
    run = CliRunner().invoke(build_app(), ["doctor"])
    assert run.exit_code == 0
    for package in examine().packages:
        assert package.name in run.output
    assert "registered with PEFT: yes" in run.output
    assert "known without an import: on" in run.output
    for plugin in examine().plugins:
        assert plugin.name in run.output
    assert "qsorsa" in run.output


def test_no_name_is_cut_off_on_80_columns():
    run = CliRunner().invoke(build_app(), ["doctor"], env={"COLUMNS": "80"})
    assert all(len(line) <= 80 for line in run.output.splitlines() if "│" in line)
    assert "…" not in run.output


@pytest.mark.parametrize("switch", ["SORSA_AUTOLOAD", "TORCH_DEVICE_BACKEND_AUTOLOAD"])
def test_a_switch_that_makes_scripts_need_an_import_is_shown_and_no_fault(switch, monkeypatch):
    monkeypatch.setenv(switch, "0")
    run = CliRunner().invoke(build_app(), ["doctor"])
    assert run.exit_code == 0
    assert f"known without an import: off: {switch}=0; scripts need `import sorsa_plugin`" in run.output


def test_the_old_command_shows_the_plug_ins_alone_and_says_where_they_are_now():
    run = CliRunner().invoke(build_app(), ["plugins", "--json"])
    assert run.exit_code == 0
    whole = json.loads(json.dumps(examine().to_json()))
    assert json.loads(run.stdout) == {"plugins": whole["plugins"], "broken": []}
    assert "sorsa doctor" in run.stderr
