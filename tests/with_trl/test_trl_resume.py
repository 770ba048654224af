"""An interrupted run of `sorsa sft` goes on where it was, and a finished one is left alone."""

from __future__ import annotations

import json

import pytest
import torch
from builders.trl_commands import ON_CPU, losses, recipe, run
from safetensors.torch import load_file

from sorsa_plugin.errors import AdapterOptionsError
from sorsa_trl.recipe import RecipeParser
from sorsa_trl.train import checkpoint_to_resume


def test_an_interrupted_run_resumes_from_the_last_complete_checkpoint(tmp_path):
    whole = run("sft", "--config", recipe(tmp_path / "a.yaml", output_dir=str(tmp_path / "a"), max_steps=4))
    saving = {"output_dir": str(tmp_path / "b"), "save_strategy": "steps", "save_steps": 1, "save_only_model": False}
    path = recipe(tmp_path / "b.yaml", max_steps=4, **saving)
    run("sft", "--config", path)
    for step in (4, 3):  # as if it had been killed while saving the third
        (tmp_path / "b" / f"checkpoint-{step}" / "trainer_state.json").unlink()
    resumed = run("sft", "--config", path, "--resume_from_checkpoint", "true")
    assert losses(resumed) == losses(whole)  # the first two read back, the others bit-equal
    found, expected = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("b", "a"))
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    with pytest.raises(AdapterOptionsError, match=r"checkpoint-9, which is no complete checkpoint; the last complete"):
        run("sft", "--config", path, "--resume_from_checkpoint", tmp_path / "b" / "checkpoint-9")


@pytest.mark.parametrize("best", [False, True])
def test_a_finished_run_that_is_resumed_takes_no_more_steps(best, tmp_path, caplog):
    saving = {"output_dir": str(tmp_path / "run"), "save_strategy": "steps", "save_steps": 1, "save_only_model": False}
    path = recipe(tmp_path / "a.yaml", max_steps=2, **saving)
    run("sft", "--config", path)
    before = load_file(tmp_path / "run" / "adapter_model.safetensors")
    first = load_file(tmp_path / "run" / "checkpoint-1" / "adapter_model.safetensors")
    options = []
    if best:  # as if evaluation had found the first checkpoint to be the best
        state = tmp_path / "run" / "checkpoint-2" / "trainer_state.json"
        values = json.loads(state.read_text())
        values |= {"best_model_checkpoint": str(tmp_path / "run" / "checkpoint-1"), "best_metric": 1.0}
        state.write_text(json.dumps(values))
        options = [
            "--load_best_model_at_end",
            "--eval_strategy",
            "steps",
            "--eval_steps",
            "1",
            "--dataset_test_split",
            "train",
        ]
    for _ in range(2):
        resumed = run("sft", "--config", path, "--resume_from_checkpoint", "true", *options)
        assert resumed.state.global_step == 2
        after = load_file(tmp_path / "run" / "adapter_model.safetensors")
        expected = first if best else before
        assert all(torch.equal(after[name], expected[name]) for name in expected)
    assert sorted(path.name for path in (tmp_path / "run").glob("checkpoint-*")) == ["checkpoint-1", "checkpoint-2"]
    assert "All 2 steps of this run were taken before" in caplog.text


def test_resuming_where_there_is_nothing_yet_starts_from_the_beginning(tmp_path, caplog):
    line = [*ON_CPU, "--output_dir", str(tmp_path), "--resume_from_checkpoint", "true"]
    assert checkpoint_to_resume(RecipeParser("sft").parse(line).training) is None
    assert "There is no complete checkpoint in" in caplog.text
