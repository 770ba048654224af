"""Runs of three methods, with checkpoints, and what `analyze` finds in them."""

from __future__ import annotations

from pathlib import Path

import pytest
from builders.llama import tiny_llama, token_batches
from peft import LoraConfig, get_peft_model
from transformers import Trainer, TrainingArguments

from sorsa_plugin import SORSAConfig, analyze
from sorsa_plugin.tools.analysis.analyze import Analysis

TARGETS = ["q_proj", "k_proj", "up_proj"]


@pytest.fixture(scope="package")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, and on it a SORSA run, a LoRA run and a full fine-tuning, with real checkpoints at steps 2 and 4."""
    root = tmp_path_factory.mktemp("runs")
    tiny_llama().save_pretrained(root / "base")
    models = {
        "sorsa": get_peft_model(tiny_llama(), SORSAConfig(r=3, target_modules=TARGETS, task_type="CAUSAL_LM")),
        "lora": get_peft_model(tiny_llama(), LoraConfig(r=3, target_modules=TARGETS, task_type="CAUSAL_LM")),
        "full": tiny_llama(),
    }
    for name, model in models.items():
        arguments = TrainingArguments(
            str(root / name),
            max_steps=4,
            save_steps=2,
            learning_rate=1e-2 if name != "full" else 1e-3,
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
        )
        Trainer(model, arguments, train_dataset=token_batches(32)).train()
    return root


@pytest.fixture(scope="package")
def analysis(runs: Path) -> Analysis:
    return analyze(runs / "base", runs=[runs / name for name in ("sorsa", "lora", "full")], progress=False)
