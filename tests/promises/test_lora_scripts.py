"""A script written for LoRA trains with SORSA after one word of it is changed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

import sorsa_plugin
from sorsa_quickstart.answering import load_base

pytest.importorskip("trl")

SCRIPT = """
from datasets import Dataset
from peft import LoraConfig
from sorsa_plugin import SORSAConfig
from sorsa_quickstart.answering import load_base
from sorsa_quickstart.task import train_examples
from trl import SFTConfig, SFTTrainer

model, tokenizer = load_base()
peft_config = LoraConfig(
    r=4,
    lora_alpha=32,
    lora_dropout=0.05,
    bias="none",
    target_modules=["q_proj", "k_proj", "v_proj", "o_proj"],
    task_type="CAUSAL_LM",
)
trainer = SFTTrainer(
    model=model,
    args=SFTConfig(
        output_dir=output,
        max_steps=2,
        per_device_train_batch_size=2,
        learning_rate=1e-3,
        logging_steps=1,
        bf16=False,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
    ),
    train_dataset=Dataset.from_list(train_examples(8)),
    processing_class=tokenizer,
    peft_config=peft_config,
)
trainer.train()
trainer.save_model(output)
"""


def ran(script: str, output: Path) -> dict[str, Any]:
    names: dict[str, Any] = {"output": str(output)}
    exec(compile(script, "script", "exec"), names)
    return names


@pytest.mark.parametrize("method", ["LORA", "SORSA"])
def test_a_typical_sft_script_runs_whatever_the_one_word(method: str, tmp_path: Path) -> None:
    changed = SCRIPT.replace("peft_config = LoraConfig(", f"peft_config = {sorsa_plugin.SORSAConfig.__name__}(")
    assert len(SCRIPT.split()) == len(changed.split())
    names = ran(changed if method == "SORSA" else SCRIPT, tmp_path)
    config = names["trainer"].model.peft_config["default"]
    assert (config.peft_type, config.r) == (method, 4)
    assert getattr(config, "lora_dropout" if method == "LORA" else "sorsa_dropout") == 0.05
    loaded = PeftModel.from_pretrained(load_base()[0], tmp_path).eval()
    tokens = torch.arange(8)[None]
    with torch.no_grad():
        expected = names["trainer"].model.eval()(tokens).logits
        assert torch.equal(loaded(tokens).logits, expected)
        assert not torch.equal(expected, load_base()[0].eval()(tokens).logits)
