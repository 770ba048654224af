"""`sorsa sft` and `sorsa dpo`: the very recipes of `trl sft` and `trl dpo`, and one word for the method."""

from __future__ import annotations

import importlib.util
import json
import logging
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from builders.trl_commands import GSM8K, ON_CPU, losses, recipe, run
from datasets import load_dataset
from peft import PeftConfig, PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import ModelConfig, get_peft_config

from sorsa_plugin import setup_adapter
from sorsa_plugin.errors import AdapterOptionsError
from sorsa_quickstart.answering import BASE
from sorsa_trl.launch import _without
from sorsa_trl.recipe import RecipeParser
from sorsa_trl.train import main

ROOT = Path(__file__).parents[2]
PREFERENCES = ROOT / "examples" / "data" / "gsm8k_preferences.jsonl"
TYPES = {"sorsa": "SORSA", "lora": "LORA", "pissa": "LORA", "dora": "LORA", "miss": "MISS", "full": None}


@torch.no_grad()
def mean_loss(model: Any, tokenizer: Any, rows: list[dict[str, str]]) -> float:
    batches = [tokenizer(row["prompt"] + row["completion"], return_tensors="pt") for row in rows]
    return sum(float(model(**batch, labels=batch["input_ids"]).loss) for batch in batches) / len(rows)


@pytest.mark.parametrize(
    "method", [name if name == "sorsa" else pytest.param(name, marks=pytest.mark.slow) for name in TYPES]
)
def test_one_word_switches_the_method(method, tmp_path):
    """In a subprocess, through `accelerate launch`, on GSM8K's rows; what is saved reloads with plain PEFT."""
    path = recipe(tmp_path / "recipe.yaml", adapter=method, max_steps=8, target_modules="all-linear")
    command = [sys.executable, "-c", "from sorsa_cli import main; main()", "sft", "--config", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    directory = tmp_path / "run"
    if TYPES[method] is None:
        model = AutoModelForCausalLM.from_pretrained(directory)
    else:
        saved = json.loads((directory / "adapter_config.json").read_text())
        assert saved["peft_type"] == TYPES[method]
        assert (saved.get("use_dora", False), saved.get("init_lora_weights") == "pissa") == (
            method == "dora",
            method == "pissa",
        )
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(BASE), directory)
    base = AutoModelForCausalLM.from_pretrained(BASE)
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    rows = [json.loads(line) for line in GSM8K.read_text().splitlines()[:8]]
    trained, untrained = (mean_loss(each.eval(), tokenizer, rows) for each in (model, base))
    assert trained < untrained
    assert ("sorsa/gap_mean" in done.stdout) == (method == "sorsa")
    assert yaml.safe_load((directory / "recipe.yaml").read_text())["adapter"] == method


def test_a_recipe_of_trl_runs_with_one_line_added(tmp_path, caplog):
    """LoRA keys, a mixture of data sets and packing; without the line it is TRL's own LoRA."""
    trls = {
        "adapter": None, "r": None, "target_modules": None, "sorsa": None, "dataset_name": None,
        "use_peft": True, "lora_r": 6, "lora_alpha": 12, "lora_dropout": 0.0,
        "lora_target_modules": ["q_proj", "k_proj"],
        "datasets": [
            {"path": "json", "data_files": str(GSM8K), "split": "train[:40]"},
            {"path": str(GSM8K), "split": "train[40:60]", "columns": ["prompt", "completion"]},
        ],
        "test_split_size": 0.2, "eval_strategy": "steps", "eval_steps": 2, "packing": True, "max_steps": 2,
    }  # fmt: skip
    path = recipe(tmp_path / "recipe.yaml", **trls)
    unchanged = RecipeParser("sft").parse(["--config", str(path)])
    theirs = get_peft_config(unchanged.model).to_dict()
    assert setup_adapter(unchanged.adapter).peft_config.to_dict() == theirs

    path.write_text(path.read_text() + "adapter: sorsa\n")
    caplog.set_level(logging.WARNING)
    trainer = run("sft", "--config", path)
    config = trainer.model.peft_config["default"]
    assert (config.peft_type.value, config.r, set(config.target_modules)) == ("SORSA", 6, {"q_proj", "k_proj"})
    assert "alpha: 12 is not used by sorsa." in caplog.text
    assert len([entry for entry in trainer.state.log_history if "eval_loss" in entry]) == 1
    assert trainer.args.packing


def test_what_trl_leaves_out_is_trls_default_for_lora_and_the_methods_own_for_others():
    def config(*arguments):
        return setup_adapter(RecipeParser("sft").parse([*ON_CPU, *arguments]).adapter).peft_config

    assert config("--use_peft").to_dict() == get_peft_config(ModelConfig(use_peft=True)).to_dict()
    assert config("--adapter", "lora").to_dict() == get_peft_config(ModelConfig(use_peft=True)).to_dict()
    assert (config("--adapter", "dora").lora_alpha, config("--adapter", "dora").lora_dropout) == (32, 0.05)
    assert (config("--adapter", "sorsa").r, config("--adapter", "sorsa").sorsa_dropout) == (16, 0.0)
    assert config() is None
    assert config("--adapter", "full", "--use_peft") is None
    assert config("--adapter", "sorsa", "--lora_r", "3").r == 3
    assert config("--adapter", "lora", "--use_dora").use_dora
    with pytest.raises(AdapterOptionsError, match="use_dora asks for 'dora' and adapter is 'sorsa'"):
        config("--adapter", "sorsa", "--use_dora")


@pytest.mark.parametrize("block", ["sorsa: {gamma: 4e-4, svd_energy: 9E-1}", "adapter_options: {gamma: 4e-4}"])
def test_a_recipes_numbers_are_those_that_setup_adapter_reads_from_it(block, tmp_path):
    """4e-4 and 5e-2 without a dot: numbers in YAML 1.2, words in TRL's YAML 1.1."""
    path = tmp_path / "recipe.yaml"
    path.write_text(f"adapter: sorsa\nr: 4\nlora_dropout: 5e-2\n{block}\n")
    parsed = setup_adapter(RecipeParser("sft").parse(["--config", str(path), *ON_CPU]).adapter).peft_config
    assert (parsed.gamma, parsed.sorsa_dropout) == (4e-4, 0.05)
    read = setup_adapter(path).peft_config.to_dict()
    assert parsed.to_dict() == read | {"task_type": "CAUSAL_LM"}


def test_the_methods_block_names_its_learning_rate_and_the_command_line_has_the_last_word(tmp_path):
    """4e-3 without a dot is a word in YAML 1.1. DeepSpeed's config takes the rate from arguments when they are made."""
    path, zero = tmp_path / "recipe.yaml", tmp_path / "zero.json"
    path.write_text("adapter: sorsa\nlearning_rate: 2.0e-4\nsorsa: {learning_rate: 4e-3}\n")
    zero.write_text('{"optimizer": {"type": "AdamW", "params": {"lr": "auto"}}}')

    def parsed(*arguments):
        return RecipeParser("sft").parse(["--config", str(path), *ON_CPU, *arguments])

    assert parsed().training.learning_rate == 4e-3
    assert setup_adapter(parsed().adapter).learning_rate == 4e-3
    assert parsed("--adapter", "lora").training.learning_rate == 2e-4
    assert parsed("--learning_rate", "1e-5").training.learning_rate == 1e-5
    assert parsed("--adapter_options", '{"learning_rate": 3e-3}').training.learning_rate == 3e-3
    if importlib.util.find_spec("deepspeed") is not None:
        engine = parsed("--deepspeed", str(zero)).training.hf_deepspeed_config.config
        assert engine["optimizer"]["params"]["lr"] == 4e-3


def test_a_blocks_learning_rate_is_trained_with(tmp_path, caplog):
    block = {"gamma": 0.01, "learning_rate": 1e-3}
    trainer = run("sft", "--config", recipe(tmp_path / "recipe.yaml", sorsa=block, max_steps=1))
    assert [group["initial_lr"] for group in trainer.optimizer.param_groups] == [1e-3] * 2
    assert "names learning_rate" not in caplog.text
    assert yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text())["sorsa"] == block


def test_the_command_line_overrides_the_recipe_and_the_resolved_recipe_runs_again(tmp_path):
    path = recipe(tmp_path / "recipe.yaml", seed=3)
    first = run(
        "sft", "--config", path, "--adapter", "lora", "--max_steps", "2", "--target_modules", "q_proj", "k_proj"
    )
    config = first.model.peft_config["default"]
    assert (config.peft_type.value, first.state.global_step) == ("LORA", 2)
    assert config.target_modules == {"q_proj", "k_proj"}
    written = tmp_path / "run" / "recipe.yaml"
    again = tmp_path / "again"
    run("sft", "--config", written, "--output_dir", again)
    saved = [load_file(directory / "adapter_model.safetensors") for directory in (tmp_path / "run", again)]
    assert saved[0].keys() == saved[1].keys()
    assert all(torch.equal(saved[0][name], saved[1][name]) for name in saved[0])
    assert yaml.safe_load(written.read_text())["sorsa"] == {"gamma": 0.01}  # waits for its word


def test_a_recipe_of_the_users_own_in_the_output_directory_stays_as_it_is(tmp_path):
    own = recipe(tmp_path / "recipe.yaml", output_dir=str(tmp_path))
    own.write_text("# my notes\n" + own.read_text())
    before = own.read_text()
    parsed = RecipeParser("sft").parse(["--config", str(own), "--max_steps", "7", *ON_CPU])
    for _ in range(2):  # a second run replaces what the first wrote
        assert parsed.write(tmp_path) == tmp_path / "recipe.run.yaml"
    assert own.read_text() == before
    assert yaml.safe_load((tmp_path / "recipe.run.yaml").read_text())["max_steps"] == 7
    (tmp_path / "run").mkdir()
    for _ in range(2):
        assert parsed.write(tmp_path / "run") == tmp_path / "run" / "recipe.yaml"


def test_dpo_of_preferences(tmp_path):
    trainer = run(
        "dpo", "--config", recipe(tmp_path / "recipe.yaml", dataset_name=str(PREFERENCES), learning_rate=2e-4)
    )
    assert losses(trainer)[0] == pytest.approx(0.6931472, abs=1e-7)
    assert losses(trainer)[-1] != losses(trainer)[0]
    assert PeftConfig.from_pretrained(str(tmp_path / "run")).peft_type.value == "SORSA"


@pytest.mark.parametrize("kind", ["parquet", "csv", "directory", "saved to disk", "one split saved to disk"])
def test_local_data_of_every_kind(kind, tmp_path):
    data = load_dataset("json", data_files=str(GSM8K))["train"].select(range(16))
    target = tmp_path / "data"
    if kind == "saved to disk":
        from datasets import DatasetDict

        DatasetDict({"train": data}).save_to_disk(str(target))
    elif kind == "one split saved to disk":
        data.save_to_disk(str(target))
    elif kind == "directory":
        target.mkdir()
        data.to_json(target / "train.jsonl")
    else:
        target = tmp_path / f"data.{kind}"
        getattr(data, f"to_{kind}")(target)
    trainer = run("sft", "--config", recipe(tmp_path / "recipe.yaml", dataset_name=str(target), max_steps=1))
    assert losses(trainer)[0] > 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"adapter": "sorza"}, r"adapter is 'sorza'; .* Did you mean 'sorsa'\?"),
        (
            {"adaptor": "sorsa"},
            r"'adaptor' is an option neither of `sorsa sft` nor of `accelerate launch`. Did you mean 'adapter",
        ),
        ({"sorsa": {"gama": 1}}, r"'gama' is no option of sorsa; .* Did you mean 'gamma'\?"),
        ({"gamma": 0.1}, r"'gamma' is an option neither .* It belongs into the block .*: `sorsa: \{gamma: ...\}`"),
        ({"sorsa_reg_update": "coupled"}, r"'sorsa_reg_update' is .*`sorsa: \{reg_update: ...\}`"),
        ({"sorsa_r": 8, "lora_r": 4}, r"'sorsa_r' is an option neither .* Did you mean 'r'\?"),
        ({"model_name_or_path": None}, "No model: give model_name_or_path"),
        ({"dataset_name": None}, "No data: give dataset_name"),
        ({"eval_strategy": "steps", "eval_steps": 1}, "The data has the splits train; expected 'test'"),
        ({"target_modules": ["w_proj"]}, r"cannot be honoured: Target modules .*w_proj.* not found"),
        ({"model_name_or_path": "nowhere/at-all"}, "The recipe, nowhere/at-all on .*cannot be honoured: "),
        ({"dataset_name": "nowhere/at-all"}, "cannot be honoured: .*nowhere/at-all"),
        ({"lora_r": 8}, "r is 4 and lora_r is 8|lora_r is 8 and r is 4"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_cannot_run_is_a_sentence(changes, message, tmp_path, capsys):
    path = recipe(tmp_path / "recipe.yaml", **changes)
    with pytest.raises(AdapterOptionsError, match=message):
        run("sft", "--config", path)
    assert main(["sft", "--config", str(path)]) == 1
    assert capsys.readouterr().err.splitlines()[-1].startswith("Error: ")
    assert not (tmp_path / "run" / "adapter_config.json").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be honoured: .*No such file or directory: .*recipe.yaml"),
        ("a: [1", "cannot be honoured: while parsing a flow sequence"),
        ("- a", "cannot be honoured: .*recipe.yaml holds a list; expected"),
        ("model_name_or_path: m\nbf16: true\nfp16: true", "cannot be honoured: .*bf16"),
    ],
    ids=["missing", "not YAML", "no mapping", "a value that the training arguments refuse"],
)
def test_a_recipe_that_cannot_be_read_is_a_sentence(content, message, tmp_path, capsys):
    path = tmp_path / "recipe.yaml"
    if content is not None:
        path.write_text(content)
    assert main(["sft", "--config", str(path)]) == 1
    last = capsys.readouterr().err
    assert re.search(f"Error: .*{message}", last)
    assert "Traceback" not in last


def test_an_empty_file_of_data_is_a_sentence(tmp_path):
    (tmp_path / "data.jsonl").write_text("")
    with pytest.raises(AdapterOptionsError, match=r"data\.jsonl is empty; expected one example"):
        run("sft", "--config", recipe(tmp_path / "recipe.yaml", dataset_name=str(tmp_path / "data.jsonl")))


@pytest.mark.parametrize("line", [["stray"], ["--num_processes", "2", "stray"], ["--use_fsdp", "stray"]])
def test_an_argument_of_no_option_is_a_sentence(line):
    with pytest.raises(AdapterOptionsError, match="'stray' is the value of no option"):
        RecipeParser("sft").parse([*ON_CPU, *line])


def test_a_config_option_without_a_file_is_a_sentence(capsys):
    assert main(["sft", "--config"]) == 1
    assert "Error: --config names no file" in capsys.readouterr().err


def test_errors_come_from_the_command_before_anything_is_launched(tmp_path):
    path = recipe(tmp_path / "recipe.yaml", adapter="sorza")
    command = [sys.executable, "-c", "from sorsa_cli import main; main()", "sft", "--config", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1
    assert "Error: adapter is 'sorza'" in done.stderr
    assert "Traceback" not in done.stderr


def test_arguments_for_the_launcher_are_told_from_those_of_the_training():
    line = ["--num_processes", "2", "--max_steps", "2", *ON_CPU, "--mixed_precision", "no"]
    parsed = RecipeParser("sft").parse(line)
    assert parsed.from_command_line == ["--num_processes", "2", "--mixed_precision", "no"]
    assert _without(line, parsed.from_command_line) == ["--max_steps", "2", *ON_CPU]


@pytest.mark.parametrize("name", ["sft", "dpo"])
def test_the_recipes_in_examples_run_as_they_stand(name, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    path = ROOT / "examples" / "recipes" / f"{name}.yaml"
    trainer = run(
        name,
        "--config",
        path,
        "--max_steps",
        3,
        "--logging_steps",
        1,
        "--output_dir",
        tmp_path,
        "--save_strategy",
        "no",
    )
    assert trainer.model.peft_config["default"].peft_type.value == "SORSA"
    assert len(losses(trainer)) == 3
    if name == "sft":
        assert losses(trainer)[-1] < losses(trainer)[0]
    else:  # policy and reference are one at first; three preferences later they are not
        assert losses(trainer)[0] == pytest.approx(0.6931472, abs=1e-7)
        assert losses(trainer)[-1] != losses(trainer)[0]
