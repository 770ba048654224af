"""The real LLaMA-Factory trains SORSA at every stage, regularized, resumes, exports and chats."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from builders.llamafactory_runs import sorsa
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from sorsa_plugin import gaps
from sorsa_quickstart.answering import BASE, load_base

pytestmark = pytest.mark.hosts

STAGES = {"pt": "texts", "sft": "sums", "rm": "pairs", "dpo": "pairs", "kto": "thumbs"}


def logs(output: Path) -> list[dict[str, float]]:
    history = json.loads((output / "trainer_state.json").read_text())["log_history"]
    return [entry for entry in history if "loss" in entry]


@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_trains_a_sorsa_adapter_with_its_regularizer(stage, folder, train):
    done = train(stage, stage=stage, dataset=STAGES[stage], sorsa={"learning_rate": 2e-3})
    assert done.returncode == 0, done.stderr[-3000:]
    config = json.loads((folder / stage / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"]) == ("SORSA", 4)
    assert len(config["target_modules"]) == 7
    trained = load_file(folder / stage / "adapter_model.safetensors")
    assert all(tensor.abs().max() > 0 for name, tensor in trained.items() if name.endswith(".dS"))
    history = logs(folder / stage)
    assert all(entry["sorsa/gap_mean"] > 0 for entry in history)
    assert history[0]["learning_rate"] == 2e-3
    if stage == "dpo":
        assert history[0]["loss"] == pytest.approx(0.6931, abs=1e-4)  # ln 2, printed to 4 digits
    assert "SORSA" in (folder / stage / "README.md").read_text()


def test_the_regularizer_makes_the_gap_smaller(folder, train):
    found = {}
    for gamma in (0.0, 0.1):
        name = f"gamma{gamma:g}"
        done = train(name, sorsa={"learning_rate": 5e-3, "gamma": gamma}, max_steps=8)
        assert done.returncode == 0, done.stderr[-3000:]
        found[gamma] = max(gaps(loaded(folder / name, trainable=True)).values())
    assert found[0.1] < 0.8 * found[0.0]


def test_resuming_ends_bit_equal_to_the_run_that_was_not_interrupted(folder, train):
    options = {"sorsa": {"learning_rate": 2e-3}, "max_steps": 4, "save_steps": 2}
    assert train("whole", **options).returncode == 0
    done = train("again", **options, resume_from_checkpoint="whole/checkpoint-2")
    assert done.returncode == 0, done.stderr[-3000:]
    whole, again = (load_file(folder / name / "adapter_model.safetensors") for name in ("whole", "again"))
    assert all(torch.equal(tensor, again[name]) for name, tensor in whole.items())


def test_training_goes_on_with_an_adapter_and_refuses_that_of_another_method(folder, train):
    assert train("first", sorsa={"learning_rate": 2e-3}, max_steps=2).returncode == 0
    done = train("second", sorsa={"learning_rate": 2e-3}, max_steps=2, adapter_name_or_path="first")
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (load_file(folder / name / "adapter_model.safetensors") for name in ("first", "second"))
    assert first.keys() == second.keys()
    frozen = [name for name in first if name.endswith((".U0", ".S0", ".V0"))]
    assert frozen
    assert all(torch.equal(first[name], second[name]) for name in frozen)
    assert any(not torch.equal(first[name], second[name]) for name in first.keys() - set(frozen))
    assert train("other", finetuning_type="lora", max_steps=1).returncode == 0
    done = train("third", adapter_name_or_path="other")
    assert done.returncode == 1
    assert "peft_type 'LORA'; expected 'SORSA'" in " ".join(done.stderr.split())
    assert not (folder / "third").exists()


def test_the_merged_export_answers_as_the_adapter_does(folder, train):
    assert train("source", sorsa={"learning_rate": 5e-3}, max_steps=8).returncode == 0
    recipe = inference(folder, "source", export_dir="merged", export_device="cpu", infer_dtype="float32")
    done = sorsa(folder, "export", recipe)
    assert done.returncode == 0, done.stderr[-3000:]
    ids = torch.arange(3, 40)[None]
    base, _ = load_base()
    adapted, merged = (
        loaded(folder / "source"),
        AutoModelForCausalLM.from_pretrained(folder / "merged", dtype=torch.float32),
    )
    with torch.no_grad():
        expected, found, untrained = (model(ids).logits for model in (adapted, merged, base))
    # LLaMA-Factory merges in the base's bf16: each weight is rounded once more, by 2^-9 of itself at most
    assert (found - expected).abs().max() < 0.2 * (untrained - expected).abs().max()


def test_chat_answers_with_the_adapter(folder, train):
    assert train("talker", sorsa={"learning_rate": 5e-3}, max_steps=8).returncode == 0
    recipe = inference(folder, "talker", infer_backend="huggingface", do_sample=False)
    done = sorsa(folder, "chat", recipe, typed="What is 2 plus 2?\nexit\n")
    assert done.returncode == 0, done.stderr[-3000:]
    assert re.search(r"Assistant: \S+", done.stdout)


def test_lora_recipes_train_as_without_us(folder, train):
    done = train("lora", finetuning_type="lora", learning_rate=1e-3)
    assert done.returncode == 0, done.stderr[-3000:]
    plain = subprocess.run(
        [str(Path(sys.executable).parent / "llamafactory-cli"), "train", "lora.yaml", "output_dir=plain"],
        cwd=folder, capture_output=True, text=True,
        env={**os.environ, "DISABLE_VERSION_CHECK": "1", "SORSA_AUTOLOAD": "0"},
    )  # fmt: skip
    assert plain.returncode == 0, plain.stderr[-3000:]
    ours, theirs = (load_file(folder / name / "adapter_model.safetensors") for name in ("lora", "plain"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


def test_two_processes_train_one_adapter(folder, train):
    done = train(
        "two", {"FORCE_TORCHRUN": "1", "NPROC_PER_NODE": "2"}, sorsa={"learning_rate": 2e-3}, ddp_backend="gloo"
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads((folder / "two" / "adapter_config.json").read_text())["peft_type"] == "SORSA"
    assert logs(folder / "two")[-1]["sorsa/gap_mean"] > 0


def inference(folder: Path, adapter: str, **keys: object) -> str:
    """A recipe for commands that load an adapter."""
    recipe = {"model_name_or_path": str(BASE), "adapter_name_or_path": adapter, "template": "empty", **keys}
    (folder / f"use-{adapter}.yaml").write_text(yaml.safe_dump(recipe))
    return f"use-{adapter}.yaml"


def loaded(adapter: Path, trainable: bool = False):
    base, _ = load_base()
    return PeftModel.from_pretrained(base, str(adapter), is_trainable=trainable)
