"""`sorsa init` writes what init_adapter writes, or ends with one sentence."""

from __future__ import annotations

import json
import os

from builders.models import tiny_mixtral
from typer.testing import CliRunner

from sorsa_cli import build_app


def test_the_command_writes_the_same(llama_files, whole, tmp_path):
    runner, app = CliRunner(), build_app()
    done = runner.invoke(app, ["init", "--model", str(llama_files), "-r", "3", "-o", str(tmp_path / "adapter")])
    assert done.exit_code == 0, done.output
    assert "Adapter of 14 layers" in done.output
    for path in whole.iterdir():
        assert (tmp_path / "adapter" / path.name).read_bytes() == path.read_bytes()
    options = "--target-modules q_proj,v_proj --rank-pattern q_proj=5 --layers 0 --gamma 0.1 --reg-update decoupled"
    done = runner.invoke(
        app, ["init", "--model", str(llama_files), "-r", "3", "-o", str(tmp_path / "b"), *options.split()]
    )
    assert done.exit_code == 0, done.output
    saved = json.loads((tmp_path / "b" / "adapter_config.json").read_text())
    assert set(saved["target_modules"]) == {"q_proj", "v_proj"}
    expected = {"rank_pattern": {"q_proj": 5}, "layers_to_transform": [0], "gamma": 0.1, "reg_update": "decoupled"}
    assert {name: saved[name] for name in expected} == expected
    experts = ["--target-modules", "", "--target-parameters", "mlp.experts.gate_up_proj,mlp.experts.down_proj"]
    tiny_mixtral().save_pretrained(tmp_path / "mixtral")
    command = ["init", "--model", str(tmp_path / "mixtral"), "-r", "3", "-o", str(tmp_path / "experts"), *experts]
    done = runner.invoke(app, command)
    assert "Adapter of 4 layers" in done.output
    for wrong, message in {"--rank-pattern q_proj": "expected NAME=RANK", "--dtype int8": "expected one of"}.items():
        done = runner.invoke(app, ["init", "--model", str(llama_files), "-o", str(tmp_path / "c"), *wrong.split()])
        assert done.exit_code == 1
        assert message in done.output
    assert os.listdir(tmp_path).count("c") == 0
