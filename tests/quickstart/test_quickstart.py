"""The quickstart: honest data, a base that cannot do the task, and a run that does what it prints."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from quickstart_base.corpus import HELD_OUT_WORDS

from sorsa_plugin import SORSAConfig
from sorsa_quickstart.answering import BASE, answer, load_base
from sorsa_quickstart.run import adapter_config, run
from sorsa_quickstart.task import final_number, is_correct, test_examples, train_examples


def test_no_test_question_is_trained_on_whatever_the_seed():
    tests = {example["prompt"] for example in test_examples(300)}
    for seed in range(3):
        assert tests.isdisjoint(example["prompt"] for example in train_examples(3000, seed))


def test_examples_are_the_same_for_the_same_seed_and_differ_between_seeds():
    assert train_examples(50, seed=1) == train_examples(50, seed=1)
    assert train_examples(50, seed=1) != train_examples(50, seed=2)


def test_the_worked_answers_are_right():
    for example in train_examples(200):
        work, final = example["completion"].rsplit("\n#### ", 1)
        for equation in work.split(", "):
            left, right = equation.split(" = ")
            assert eval(left) == int(right)
        assert work.endswith(f"= {final}")


@pytest.mark.parametrize(
    ("text", "number"),
    [(" 1 + 2 = 3\n#### 3", "3"), ("#### -4", "-4"), ("#### 1,200 ", "1200"), ("3", None), ("#### 3 coins", None)],
)
def test_only_a_number_on_the_closing_line_is_an_answer(text, number):
    assert final_number(text) == number
    assert is_correct({"completion": "\n#### 3"}, text) == (number == "3")


def test_the_tasks_words_were_held_out_of_the_base_models_corpus():
    from itertools import islice

    from quickstart_base.corpus import generate

    text = " ".join(f"{item.prompt}{item.completion}" for item in islice(generate(seed=0), 3000)).lower()
    assert [word for word in HELD_OUT_WORDS if word in text] == []
    assert all(any(word in example["prompt"] for word in HELD_OUT_WORDS) for example in test_examples(50))


def test_the_base_cannot_do_the_task_and_its_tokenizer_writes_any_text():
    model, tokenizer = load_base()
    questions = test_examples(50)
    assert sum(map(is_correct, questions, answer(model, tokenizer, questions))) <= 1
    text = "Ünïcode ✓, 3.14 €\n\ttabs and 日本語"
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text
    assert sum(path.stat().st_size for path in BASE.iterdir()) < 6_000_000


def test_unknown_adapters_and_a_gamma_for_lora_are_errors():
    with pytest.raises(ValueError, match="The adapter is 'dora'; expected one of sorsa, lora"):
        adapter_config("dora", None)
    with pytest.raises(ValueError, match="LoRA has no orthonormal regularizer"):
        adapter_config("lora", 0.1)
    assert isinstance(adapter_config("sorsa", 0.1), SORSAConfig)


def test_a_few_steps_run_to_the_end_with_every_check_passed(tmp_path, monkeypatch):
    monkeypatch.setattr("sorsa_quickstart.run.TEST_QUESTIONS", 20)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("kept")
    report = run("sorsa", steps=3, seed=0, gamma=None, output=tmp_path / "out", plot=tmp_path / "charts" / "plot.png")
    assert (tmp_path / "out" / "mine.txt").read_text() == "kept"
    assert report["base_weights_untouched"]
    assert report["disabled_adapter_answers_as_the_base"]
    assert report["fresh_process_answers_the_same"]
    assert report == json.loads((tmp_path / "out" / "report.json").read_text())
    assert (tmp_path / "charts" / "plot.png").read_bytes().startswith(b"\x89PNG")


def quickstart(output: Path, *options: str) -> dict[str, Any]:
    command = [
        sys.executable,
        "-c",
        "from sorsa_cli import main; main()",
        "quickstart",
        "--output",
        str(output),
    ]
    subprocess.run([*command, *options], check=True, capture_output=True, timeout=900)
    return json.loads((output / "report.json").read_text())


@pytest.mark.slow
def test_it_learns_the_task_and_the_regularizer_keeps_the_factors_orthonormal(tmp_path):
    report = quickstart(tmp_path / "sorsa")
    assert report["accuracy_before"] <= 0.02
    assert report["accuracy_after"] >= 0.9
    assert report["base_weights_untouched"]
    free = quickstart(tmp_path / "free", "--gamma", "0")
    assert report["gap_mean"] < free["gap_mean"] / 10


@pytest.mark.slow
def test_lora_runs_the_same_way(tmp_path):
    report = quickstart(tmp_path / "lora", "--adapter", "lora")
    assert report["accuracy_after"] >= 0.9
    assert report["gap_mean"] is None


@pytest.mark.slow
def test_the_same_seed_gives_the_same_adapter_and_another_seed_another(tmp_path):
    first, again, other = (
        quickstart(tmp_path / name, "--steps", "5", "--seed", seed) for name, seed in zip("abc", "001", strict=True)
    )
    assert first == again
    assert first["adapter_sha256"] != other["adapter_sha256"]
