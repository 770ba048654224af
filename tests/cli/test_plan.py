"""`sorsa plan` prints its numbers as a table or as JSON."""

from __future__ import annotations

import json

from builders.llama import tiny_llama
from typer.testing import CliRunner

from sorsa_cli import build_app
from sorsa_plugin import SORSAConfig, plan


def config(**options) -> SORSAConfig:
    return SORSAConfig(**{"r": 3, "task_type": "CAUSAL_LM", "target_modules": "all-linear", **options})


def config_only(model, directory) -> None:
    """A directory with a config and no weights."""
    model.save_pretrained(directory)
    for path in directory.glob("model*"):
        path.unlink()


def test_the_command_prints_a_table_or_json(tmp_path):
    config_only(tiny_llama(), tmp_path)
    runner, app = CliRunner(), build_app()
    arguments = ["plan", "--model", str(tmp_path), "-r", "3", "--unit-seconds", "1", "--gpus", "2", "--engine", "fsdp2"]
    shown = runner.invoke(app, arguments)
    assert shown.exit_code == 0, shown.output
    found = plan(tmp_path, config(), gpus=2, engine="fsdp2", unit_seconds=1.0)
    assert f"{found.trainable_parameters:,}" in shown.output
    assert f"{found.adapter_bytes:,} bytes" in shown.output
    content = json.loads(runner.invoke(app, [*arguments, "--json"]).stdout)
    assert content["memory"]["total"] == found.memory.total
    assert content["adapter_bytes"] == found.adapter_bytes
    refused = runner.invoke(app, [*arguments, "--engine", "tpu"])
    assert refused.exit_code == 1
    assert "engine is 'tpu'" in refused.output
    refused = runner.invoke(app, [*arguments, "--task-type", "CHAT"])
    assert refused.exit_code == 1
    assert "--task-type is 'CHAT'; expected one of SEQ_CLS," in refused.output
