"""The other `axolotl` commands on a SORSA recipe: merge-lora, inference, preprocess and a packed chat run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("axolotl")

from builders.axolotl_runs import (
    GSM8K,
    SORSA_RECIPE,
    Run,
    assert_the_change_was_added,
    axolotl,
    base_logits,
    plain_peft_logits,
    recipe,
    trained,
)
from with_axolotl.probe_plugin import INPUT_IDS

pytestmark = pytest.mark.axolotl


def test_merge_lora_writes_the_base_weights_plus_the_change(sorsa_run: Run) -> None:
    from transformers import AutoModelForCausalLM

    run = axolotl("merge-lora", SORSA_RECIPE, sorsa_run.output)
    assert run.returncode == 0, run.log[-4000:]
    merged = AutoModelForCausalLM.from_pretrained(sorsa_run.output / "merged", dtype=torch.float32)
    assert_the_change_was_added(merged, sorsa_run)
    with torch.no_grad():
        logits = merged.eval()(input_ids=INPUT_IDS).logits
    # another order of the same sums through four layers; a model left unmerged is off by whole units
    torch.testing.assert_close(logits, sorsa_run.logits, rtol=0, atol=1e-3)
    assert float((base_logits() - logits).abs().max()) > 0.1


def test_inference_answers_with_the_adapter(sorsa_run: Run) -> None:
    question = "Natalia sold clips to 48 of her friends."
    run = axolotl("inference", SORSA_RECIPE, sorsa_run.output, f"--lora-model-dir={sorsa_run.output}", stdin=question)
    assert run.returncode == 0, run.log[-4000:]
    assert f"<|bos|>{question}" in run.log
    assert "trainable params: 0 " in run.log


def test_preprocess_then_a_packed_run_on_chat_data(runs: Path) -> None:
    rows = [json.loads(line) for line in GSM8K.read_text().splitlines()]
    chats = [
        {"messages": [{"role": "user", "content": r["prompt"]}, {"role": "assistant", "content": r["completion"]}]}
        for r in rows
    ]
    data = runs / "chat.jsonl"
    data.write_text("".join(json.dumps(chat) + "\n" for chat in chats))
    changed = recipe(
        datasets=[{"path": str(data), "ds_type": "json", "type": "chat_template", "field_messages": "messages"}],
        sample_packing=True,
        pad_to_sequence_len=True,
        sequence_len=512,
        gradient_accumulation_steps=1,
        max_steps=3,
        save_steps=3,
        val_set_size=0,
        eval_steps=None,
    )
    prepared = axolotl("preprocess", changed, runs / "packed")
    assert prepared.returncode == 0, prepared.log[-4000:]
    assert "Success! Preprocessed data path" in prepared.log
    run = trained(changed, runs / "packed")
    assert "Loading prepared dataset from disk" in run.log
    assert len(run.logged("sorsa/gap_mean")) == 3
    torch.testing.assert_close(plain_peft_logits(run.output), run.logits, rtol=0, atol=0)
