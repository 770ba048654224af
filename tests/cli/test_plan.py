"""`sorsa plan` prints its numbers as a table or as JSON."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from builders.llama import tiny_llama
from typer.testing import CliRunner

from sorsa_cli import build_app
from sorsa_cli.plan import _show
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


def test_no_bar_is_shown_for_work_that_is_not_done(tmp_path, capsys):
    config_only(tiny_llama(layers=1), tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**settings, "intermediate_size": 2**15}))  # a bar's size
    plan(tmp_path, config(), unit_seconds=1.0)
    assert "singular triplets" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("gib", "line"),
    [(1, "Fits in a GPU of 16 GB."), (24, "Fits in a GPU of 24 GB."), (24.1, "Fits in a GPU of 40 GB."),
     (81, "More than a GPU of 80 GB holds: see --engine")],
)  # fmt: skip
def test_it_says_which_gpu_has_room(gib, line, tmp_path, capsys):
    config_only(tiny_llama(), tmp_path)
    found = plan(tmp_path, config(), unit_seconds=1.0)
    rest = found.memory.total - found.memory.weights
    sized = replace(found, memory=replace(found.memory, weights=int(gib * 2**30) - rest))
    _show(sized, "1 x 8 tokens")
    assert line in capsys.readouterr().out
    _show(replace(sized, memory=replace(sized.memory, activations=None)), "1 x 8 tokens")
    assert "without the activations, which are unknown" in capsys.readouterr().out


def test_initialisation_time_is_called_that(tmp_path, capsys):
    config_only(tiny_llama(), tmp_path)
    _show(plan(tmp_path, config(), unit_seconds=1.0), "1 x 8 tokens")
    assert "initialisation time, estimated: " in capsys.readouterr().out
