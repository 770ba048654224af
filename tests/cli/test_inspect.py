"""`sorsa inspect` shows the numbers of an adapter as a table or as JSON."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest
from builders.adapters import perturb
from builders.llama import tiny_llama
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from sorsa_cli import build_app
from sorsa_cli.inspect import _print
from sorsa_plugin import SORSAConfig
from sorsa_plugin.learning_rate import HEALTHY_GAP
from sorsa_plugin.tools.inspect_adapter import LayerSummary, inspect_adapter

FILE = "adapter_model.safetensors"


OPTIONS = {"r": 3, "target_modules": "all-linear", "rank_pattern": {"q_proj": 5}, "modules_to_save": ["lm_head"]}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    directory = tmp_path_factory.mktemp("saved")
    model = get_peft_model(tiny_llama(), SORSAConfig(**OPTIONS, gamma=0.25, reg_update="decoupled"))
    perturb(model)
    model.save_pretrained(directory)
    return directory, model


def test_json_holds_config_and_layers(saved):
    run = CliRunner().invoke(build_app(), ["inspect", str(saved[0]), "--json"])
    assert run.exit_code == 0
    found = json.loads(run.stdout)
    assert found == json.loads(json.dumps(inspect_adapter(saved[0]).to_json()))
    assert found["config"]["gamma"] == found["config"]["resolved_gamma"] == 0.25
    assert found["config"]["target_modules"] == sorted(found["config"]["target_modules"])
    assert found["config"]["base_storage"] == "float32"
    assert len(found["layers"]) == 14
    assert found["bytes"] == (saved[0] / FILE).stat().st_size


def test_the_table_names_every_layer_and_the_options(saved):
    run = CliRunner().invoke(build_app(), ["inspect", str(saved[0])])
    assert run.exit_code == 0
    for layer in inspect_adapter(saved[0]).layers:
        line = next(line for line in run.output.splitlines() if layer.name in line)
        assert f"{layer.S_min:.3g}..{layer.S_max:.3g}" in line
        assert f"{layer.out_features} x {layer.in_features}" in line
    assert "gamma 0.25, decoupled, lr" in run.output
    assert "base_model.model.lm_head.weight" in run.output


def test_nan_is_shown_and_is_still_json(saved, tmp_path):
    shutil.copytree(saved[0], tmp_path / "nan")
    tensors = load_file(saved[0] / FILE)
    broken = next(name for name in tensors if name.endswith("1.mlp.up_proj.sorsa_factors.dU"))
    save_file({**tensors, broken: tensors[broken] * float("nan")}, tmp_path / "nan" / FILE)
    layers = {layer.name: layer for layer in inspect_adapter(tmp_path / "nan").layers}
    assert [name for name, layer in layers.items() if not layer.finite] == ["model.layers.1.mlp.up_proj"]
    run = CliRunner().invoke(build_app(), ["inspect", str(tmp_path / "nan"), "--json"])
    found = json.loads(run.stdout, parse_constant=lambda text: pytest.fail(f"{text} is no JSON"))
    assert [layer["name"] for layer in found["layers"] if layer["gap_U"] is None] == ["model.layers.1.mlp.up_proj"]
    run = CliRunner().invoke(build_app(), ["inspect", str(tmp_path / "nan")])
    assert "1 layers hold NaN or infinity, the first of them model.layers.1.mlp.up_proj" in run.output


WIDE = LayerSummary(
    "model.layers.31.mlp.experts.gate_up_proj", 64, 14336, 14336, 1024,
    1.2e-07, 2.3e-07, 1.23e-05, 2.34e-05, 3.4e-07, 4.5e-07, 5.6e-07, 6.7,
)  # fmt: skip


@pytest.mark.parametrize("columns", [80, 140])
def test_a_large_model_fits_into_the_terminal(columns, saved, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", str(columns))
    _print(replace(inspect_adapter(saved[0]), layers=(WIDE,)))
    shown = capsys.readouterr().out
    table = shown[shown.index("out x in") :]
    assert max(map(len, table.splitlines())) <= columns
    assert f"Healthy: a mean gap up to {HEALTHY_GAP:g} " in table
    numbers = ("64 x", "14336 x 14336", "1024", "1.2e-07", "2.3e-07", "1.23e-05", "2.34e-05", "3.4e-07", "4.5e-07")
    assert all(number in table for number in numbers)
