"""`axolotl train` with `load_in_4bit` and `load_in_8bit`: SORSA on a quantised base, and on quantised residuals."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("axolotl")
pytest.importorskip("bitsandbytes")

from builders.axolotl_runs import (
    BASE,
    Run,
    assert_the_change_was_added,
    assert_the_same_end,
    axolotl,
    recipe,
    trained,
)
from peft import PeftModel
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from with_axolotl.probe_plugin import INPUT_IDS

pytestmark = pytest.mark.axolotl

ADAPTERS = ("sorsa", "qsorsa")


def in_four_bits(adapter: str, **changes: Any) -> dict[str, Any]:
    return recipe(adapter=adapter, load_in_4bit=True, **changes)


@pytest.fixture(scope="module")
def four_bit_runs(runs: Path) -> dict[str, Run]:
    return {adapter: trained(in_four_bits(adapter), runs / f"{adapter}-4bit") for adapter in ADAPTERS}


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_four_bits_train_and_answer_in_plain_peft_as_in_training(adapter: str, four_bit_runs: dict[str, Run]) -> None:
    run = four_bit_runs[adapter]
    evaluation = run.logged("eval_loss")
    assert evaluation[8] < evaluation[4] < run.logged("loss")[1]
    assert "converting PEFT model w/ prepare_model_for_kbit_training" in run.log
    assert run.log.count("Quantised the residuals of 28 weights") == (adapter == "qsorsa")
    assert run.probe["trained"] == run.probe["adapter"] == ["torch.float32"]
    stored = BitsAndBytesConfig(  # what Axolotl asks for
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_quant_storage=torch.bfloat16,
    )
    base = AutoModelForCausalLM.from_pretrained(BASE, quantization_config=stored, dtype=torch.float32)
    model = PeftModel.from_pretrained(base, run.output).eval()
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=INPUT_IDS).logits, run.logits, rtol=0, atol=0)


def test_the_residual_starts_elsewhere_than_the_quantised_base(four_bit_runs: dict[str, Run]) -> None:
    first = [four_bit_runs[adapter].logged("loss")[1] for adapter in ADAPTERS]
    assert first[0] != first[1]


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_a_resumed_run_on_four_bits_ends_bit_equal(adapter: str, four_bit_runs: dict[str, Run], runs: Path) -> None:
    output = runs / f"{adapter}-4bit-resumed"
    shutil.copytree(four_bit_runs[adapter].output / "checkpoint-4", output / "checkpoint-4")
    run = trained(in_four_bits(adapter, auto_resume_from_checkpoints=True), output)
    assert_the_same_end(run, four_bit_runs[adapter], start=4)


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_merge_lora_adds_the_change_to_the_full_precision_base(adapter: str, four_bit_runs: dict[str, Run]) -> None:
    """Axolotl merges into the base as base_model has it, for QLoRA too."""
    output = four_bit_runs[adapter].output
    run = axolotl("merge-lora", in_four_bits(adapter), output)
    assert run.returncode == 0, run.log[-4000:]
    merged = AutoModelForCausalLM.from_pretrained(output / "merged", dtype=torch.float32)
    assert not hasattr(merged.config, "quantization_config")
    assert_the_change_was_added(merged, four_bit_runs[adapter])


def test_inference_on_the_residual(four_bit_runs: dict[str, Run]) -> None:
    """In bf16: Axolotl casts the packed weights, which are stored as bfloat16, to the recipe's dtype, QLoRA's too."""
    output, question = four_bit_runs["qsorsa"].output, "Natalia sold clips to 48 of her friends."
    run = axolotl("inference", in_four_bits("qsorsa", bf16=True), output, f"--lora-model-dir={output}", stdin=question)
    assert run.returncode == 0, run.log[-4000:]
    assert f"<|bos|>{question}" in run.log


def test_eight_bits_train(runs: Path) -> None:
    short = {"max_steps": 3, "save_steps": 3, "val_set_size": 0, "eval_steps": None}
    run = trained(recipe(adapter="qsorsa", load_in_8bit=True, **short), runs / "qsorsa-8bit")
    assert "Quantised the residuals of 28 weights" in run.log
    assert len(run.logged("sorsa/gap_mean")) == 3


def test_qsorsa_without_a_quantised_base_is_refused(runs: Path) -> None:
    run = axolotl("train", recipe(adapter="qsorsa"), runs / "unquantised")
    assert run.returncode != 0
    assert "is not quantised. Load the base with a quantization_config (in Axolotl: load_in_4bit: true)" in run.log
