"""`axolotl train` with `adapter: sorsa`: what it trains, logs, saves, and how it resumes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

pytest.importorskip("axolotl")

from builders.axolotl_runs import (
    GSM8K,
    LORA_RECIPE,
    METRICS,
    SORSA_RECIPE,
    Run,
    assert_the_same_end,
    plain_peft_logits,
    recipe,
    trained,
)

pytestmark = pytest.mark.axolotl


def test_one_word_and_the_plugin_switch_a_recipe_from_lora_to_sorsa(lora_run: Run, sorsa_run: Run) -> None:
    pairs = zip(LORA_RECIPE.splitlines(), SORSA_RECIPE.splitlines(), strict=True)
    assert [(a, b) for a, b in pairs if a != b] == [
        ("plugins: [probe_plugin.ProbePlugin]", "plugins: [sorsa_axolotl.SORSAPlugin, probe_plugin.ProbePlugin]"),
        ("adapter: lora", "adapter: sorsa"),
    ]
    configs = [json.loads((run.output / "adapter_config.json").read_text()) for run in (lora_run, sorsa_run)]
    assert [config["peft_type"] for config in configs] == ["LORA", "SORSA"]
    assert configs[1]["r"] == configs[0]["r"] == 8
    assert set(configs[1]["target_modules"]) == set(configs[0]["target_modules"])
    assert configs[1]["task_type"] == "CAUSAL_LM"


def test_the_loss_falls_from_the_base_models(lora_run: Run, sorsa_run: Run) -> None:
    # the first step's loss is computed before any change, and both start as the base model
    assert sorsa_run.logged("loss")[1] == pytest.approx(lora_run.logged("loss")[1], rel=1e-5)
    evaluation = sorsa_run.logged("eval_loss")
    assert evaluation[8] < evaluation[4] < sorsa_run.logged("loss")[1]


def test_every_step_logs_the_regularizer_on_the_console_and_in_tensorboard(sorsa_run: Run) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (directory,) = (sorsa_run.output / "runs").iterdir()
    events = EventAccumulator(str(directory)).Reload()
    for metric in METRICS:
        logged = sorsa_run.logged(metric)
        assert sorted(logged) == list(range(1, 9))
        written = {event.step: event.value for event in events.Scalars(f"train/{metric}")}
        # event files hold float32
        assert written == pytest.approx(logged, rel=1e-6)
        assert f"'{metric}': " in sorsa_run.log
    gamma, learning_rate = sorsa_run.logged("sorsa/gamma"), sorsa_run.logged("learning_rate")
    # gamma_t = gamma eta_t / eta_max
    assert gamma == pytest.approx({step: 4e-4 * rate / 1e-3 for step, rate in learning_rate.items()})
    assert sorsa_run.logged("sorsa/gap_mean")[8] > 1e-4


def test_an_unused_lora_alpha_gets_one_line_and_a_learning_rate_that_fits_none(sorsa_run: Run) -> None:
    assert sorsa_run.log.count("alpha: 16 is not used by sorsa") == 1
    assert "The learning rate" not in sorsa_run.log


def test_the_saved_adapter_answers_in_plain_peft_as_the_trained_model_did(sorsa_run: Run) -> None:
    torch.testing.assert_close(plain_peft_logits(sorsa_run.output), sorsa_run.logits, rtol=0, atol=0)
    card = (sorsa_run.output / "README.md").read_text()
    assert "## SORSA adapter" in card
    assert "See axolotl config" in card


def test_auto_resume_skips_a_checkpoint_that_was_cut_off_and_ends_bit_equal(sorsa_run: Run, runs: Path) -> None:
    output = runs / "auto_resumed"
    shutil.copytree(sorsa_run.output / "checkpoint-4", output / "checkpoint-4")
    shutil.copytree(sorsa_run.output / "checkpoint-4", output / "checkpoint-6")
    weights = output / "checkpoint-6" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    (output / "checkpoint-6" / "trainer_state.json").unlink()
    run = trained(SORSA_RECIPE + "auto_resume_from_checkpoints: true\n", output)
    assert_the_same_end(run, sorsa_run, start=4)


def test_a_run_resumed_from_a_named_checkpoint_ends_bit_equal(sorsa_run: Run, runs: Path) -> None:
    checkpoint = sorsa_run.output / "checkpoint-4"
    run = trained(SORSA_RECIPE, runs / "resumed", f"--resume-from-checkpoint={checkpoint}")
    assert "'loss'" in run.log
    assert_the_same_end(run, sorsa_run, start=4)


def test_training_on_a_saved_adapter_in_bf16_with_gradient_checkpointing(sorsa_run: Run, runs: Path) -> None:
    changed = recipe(
        lora_model_dir=str(sorsa_run.output),
        lora_r=4,
        sorsa={"gamma": 1e-3},
        bf16=True,
        gradient_checkpointing=True,
        datasets=[{"path": str(GSM8K), "ds_type": "json", "type": "completion", "field": "completion"}],
        max_steps=3,
        save_steps=3,
        val_set_size=0,
        eval_steps=None,
    )
    run = trained(changed, runs / "continued")
    probe = run.probe
    assert probe["trained"] == probe["adapter"] == ["torch.float32"]
    assert probe["frozen"] == probe["activations"] == ["torch.bfloat16"]
    assert probe["gradient_checkpointing"]
    before, after = sorsa_run.adapter, run.adapter
    for name in before:
        frozen = name.rsplit(".", 1)[1] in ("U0", "S0", "V0", "fingerprint")
        assert torch.equal(before[name], after[name]) == frozen, name
    assert run.logged("sorsa/gap_mean")[1] == pytest.approx(sorsa_run.logged("sorsa/gap_mean")[8], rel=1e-5)
    # gamma of the recipe, not of the saved adapter; the third step is the first at the peak of the schedule
    assert run.logged("sorsa/gamma")[3] == pytest.approx(1e-3)
    assert "keeps what it was made with: r 8, not 4" in run.log
