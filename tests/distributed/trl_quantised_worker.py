"""One of several processes in which TRL trains SORSA under FSDP2 on 4 bits stored as bf16, by a config alone."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

import torch
from builders.engines import engine_arguments, leave, prepare
from datasets import Dataset
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from trl import SFTConfig, SFTTrainer

from sorsa_plugin import SORSAConfig
from sorsa_quickstart.answering import BASE, load_base
from sorsa_quickstart.task import train_examples


def train(output: Path) -> dict:
    four_bits = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_storage=torch.bfloat16, bnb_4bit_compute_dtype=torch.bfloat16
    )
    trainer = SFTTrainer(
        AutoModelForCausalLM.from_pretrained(BASE, quantization_config=four_bits, dtype=torch.bfloat16),
        args=SFTConfig(
            str(output / "run"),
            max_steps=6,
            learning_rate=2e-3,
            logging_steps=1,
            per_device_train_batch_size=4,
            save_strategy="no",
            report_to="none",
            gradient_checkpointing=False,
            disable_tqdm=True,
            **engine_arguments("fsdp2"),
        ),
        train_dataset=Dataset.from_list(train_examples(64)),
        processing_class=load_base()[1],
        peft_config=SORSAConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    trainer.train()
    trainer.save_model(str(output / "adapter"))
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    return {
        "trained": sorted({str(p.dtype) for p in trainer.model.parameters() if p.requires_grad}),
        "losses": [entry["loss"] for entry in history],
        "gaps": [entry["sorsa/gap_mean"] for entry in history],
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("output", type=Path)
    options = parser.parse_args()
    prepare("fsdp2")
    report = train(options.output)
    if os.environ.get("RANK") == "0":
        (options.output / "report.json").write_text(json.dumps(report))
    leave()
