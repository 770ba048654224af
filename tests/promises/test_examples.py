"""The examples run as a user runs them: as scripts, on files."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from builders.llama import tiny_llama
from peft import PeftConfig
from transformers import AutoTokenizer

from sorsa_quickstart.answering import BASE
from sorsa_quickstart.task import train_examples

EXAMPLES = Path(__file__).parents[2] / "examples"


def run_script(name: str, *options: object) -> str:
    command = [sys.executable, str(EXAMPLES / name), *map(str, options)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr[-4000:]
    return result.stdout


def write_jsonl(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def gsm8k_like(count: int) -> list[dict]:
    """Rows in GSM8K's columns and answer format."""
    return [{"question": row["prompt"], "answer": row["completion"]} for row in train_examples(count)]


def chat(count: int) -> list[dict]:
    return [
        {
            "messages": [
                {"role": "user", "content": row["prompt"]},
                {"role": "assistant", "content": row["completion"]},
            ]
        }
        for row in train_examples(count)
    ]


@pytest.mark.parametrize("rows", [gsm8k_like(80), chat(80)], ids=["question-answer", "chat"])
def test_hf_trainer_lowers_the_loss_on_the_embedded_base(rows, tmp_path):
    data = write_jsonl(tmp_path / "data.jsonl", rows)
    options = ["--model", BASE, "--data", data, "--output", tmp_path / "run", "--rank", 8, "--lr", 2e-3]
    run_script("hf_trainer.py", *options, "--epochs", 2, "--batch", 8)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["steps"] == 18  # 72 rows left after the held-out tenth
    assert summary["eval_loss_after"] < summary["eval_loss_before"]
    assert PeftConfig.from_pretrained(str(tmp_path / "run" / "adapter")).r == 8


@pytest.mark.slow
def test_hf_trainer_trains_other_methods_by_one_word(tmp_path):
    data = write_jsonl(tmp_path / "data.jsonl", gsm8k_like(40))
    options = ["--model", BASE, "--data", data, "--rank", 4, "--max-steps", 2, "--max-length", 64]
    for adapter in ("lora", "full"):
        run_script("hf_trainer.py", *options, "--adapter", adapter, "--output", tmp_path / adapter)
        summary = json.loads((tmp_path / adapter / "summary.json").read_text())
        assert (summary["adapter"], summary["gap_mean"]) == (adapter, None)


@pytest.mark.slow
@pytest.mark.parametrize("adapter", ["sorsa", "lora"])
def test_trl_sft_as_it_stands(adapter, tmp_path):
    run_script("trl_sft.py", "--adapter", adapter, "--max-steps", 3, "--output", tmp_path)
    assert PeftConfig.from_pretrained(str(tmp_path)).peft_type.value == adapter.upper()


@pytest.mark.slow
def test_trl_dpo_as_it_stands(tmp_path):
    output = run_script("trl_dpo.py", "--max-steps", 2, "--output", tmp_path)
    assert "first DPO loss 0.6931472" in output
    assert PeftConfig.from_pretrained(str(tmp_path)).peft_type.value == "SORSA"


@pytest.mark.slow
def test_compare_methods_measures_every_method(tmp_path, monkeypatch):
    monkeypatch.chdir(EXAMPLES.parent)
    options = ["--max_steps", 3, "--eval_steps", 3, "--logging_steps", 1, "--save_strategy", "no"]
    run_script("compare_methods.py", "--methods", "sorsa", "full", "--output", tmp_path, *options)
    found = json.loads((tmp_path / "comparison.json").read_text())
    assert found["sorsa"]["trainable"] < found["full"]["trainable"]
    assert all(row["step_ms"] > 0 and row["peak_mib"] > 0 for row in found.values())


def test_hf_trainer_runs_on_a_random_model_and_resumes(tmp_path):
    base = tmp_path / "base"
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    model = tiny_llama()
    model.resize_token_embeddings(len(tokenizer))
    model.save_pretrained(base)
    tokenizer.save_pretrained(base)
    data = write_jsonl(tmp_path / "data.jsonl", gsm8k_like(40))
    options = ["--model", base, "--data", data, "--output", tmp_path / "run", "--rank", 4, "--max-length", 64]
    run_script("hf_trainer.py", *options, "--max-steps", 3)
    run_script("hf_trainer.py", *options, "--max-steps", 5, "--resume")
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["steps"] == 5
    state = json.loads((tmp_path / "run" / "checkpoint-5" / "trainer_state.json").read_text())
    assert state["global_step"] == 5


@pytest.mark.slow
@pytest.mark.parametrize("method", ["sorsa", "lora"])
def test_minilms_real_weights_learn_to_count_the_steps_of_a_solution(method, tmp_path):
    rows = []
    for index, row in enumerate(train_examples(400)):
        steps = 1 + index % 3  # a target that the words tell: one more sentence a step
        rows.append({"question": row["prompt"] + " Then add one." * (steps - 1), "answer": "<<" * steps})
    data = write_jsonl(tmp_path / "data.jsonl", rows)
    output = tmp_path / "run"
    run_script(
        "minilm_regression.py", "--data", data, "--method", method, "--steps", 60, "--examples", 400, "--output", output
    )
    summary = json.loads((output / "summary.json").read_text())
    assert summary["pearson_after"] > 0.8
    assert summary["mse_after"] < 0.5 * summary["mse_before"]


@pytest.mark.slow
def test_smollm2_is_unpacked_trained_and_asked(tmp_path):
    options = ["--steps", 2, "--batch", 1, "--held-out", 2, "--questions", 1, "--output", tmp_path]
    output = run_script("smollm2.py", *options)
    assert "--- before: " in output
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert 0 < summary["eval_loss_before"] < 3, "a language model, whose loss a random one would not reach"
    assert summary["eval_loss_after"] != summary["eval_loss_before"]
    assert summary["largest_gap"] > 0
    assert PeftConfig.from_pretrained(str(tmp_path / "adapter")).base_model_name_or_path == str(tmp_path / "base")


def test_the_notebooks_cells_run_in_order(tmp_path, monkeypatch, capsys):
    """As plain Python, without the cell that installs, and for two steps."""
    monkeypatch.chdir(tmp_path)
    cells = json.loads((EXAMPLES / "notebooks" / "quickstart.ipynb").read_text())["cells"]
    names: dict[str, object] = {"__name__": "notebook"}
    for number, cell in enumerate(cells):
        source = "".join(cell["source"])
        if cell["cell_type"] == "code" and not source.startswith("%"):
            exec(compile(source.replace("STEPS = 60", "STEPS = 2"), f"cell {number}", "exec"), names)
    printed = capsys.readouterr().out
    assert "factors, mean gap" in printed
    assert (tmp_path / "runs/notebook/adapter/lora/adapter_config.json").is_file()
