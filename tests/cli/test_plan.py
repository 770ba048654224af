"""`sorsa plan` prints its numbers as a table or as JSON."""

from __future__ import annotations

import json
import re
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
    assert f"{found.lora.trainable_parameters:,}" in shown.output
    assert re.search(rf"in bytes .* {found.adapter_bytes:,} .* {found.lora.adapter_bytes:,} ", shown.output)
    assert f"a file {found.adapter_bytes / found.lora.adapter_bytes:.1f} times as large" in shown.output
    content = json.loads(runner.invoke(app, [*arguments, "--json"]).stdout)
    assert content["memory"]["total"] == found.memory.total
    assert content["adapter_bytes"] == found.adapter_bytes
    assert content["lora"]["memory"]["total"] == found.lora.memory.total < found.memory.total
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


@pytest.mark.parametrize("columns", [80, 140])
def test_both_methods_fit_into_the_terminal(columns, tmp_path, monkeypatch, capsys):
    config_only(tiny_llama(), tmp_path)
    found = plan(tmp_path, config(), unit_seconds=1.0)
    large = replace(found, trainable_parameters=3 * 10**9, adapter_bytes=10**13)
    monkeypatch.setenv("COLUMNS", str(columns))
    _show(large, "64 x 8192 tokens, checkpointed")
    shown = capsys.readouterr().out
    table = shown[shown.index("On each of") :]
    assert max(map(len, table.splitlines())) <= columns
    assert "3,000,000,000" in table
    assert "10,000,000,000,000" in table


def test_a_lora_that_peft_refuses_is_said(tmp_path, capsys):
    config_only(tiny_llama(), tmp_path)
    _show(replace(plan(tmp_path, config(), unit_seconds=1.0), lora=None, lora_refusal="It is refused."), "1 x 8 tokens")
    shown = capsys.readouterr().out
    assert "No LoRA beside it: It is refused." in shown
    assert "LoRA, same rank" not in shown
