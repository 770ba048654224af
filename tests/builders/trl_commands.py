"""Runs of `sorsa sft` and `sorsa dpo` without their launcher, in this process, on the embedded base."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from sorsa_quickstart.answering import BASE
from sorsa_trl.recipe import RecipeParser
from sorsa_trl.train import train

GSM8K = Path(__file__).parents[2] / "examples" / "data" / "gsm8k" / "train.jsonl"
ON_CPU = ["--output_dir", "x", "--use_cpu", "--bf16", "false"]


def recipe(path: Path, **changes: Any) -> Path:
    options = {
        "model_name_or_path": str(BASE),
        "dataset_name": str(GSM8K),
        "output_dir": str(path.parent / "run"),
        "adapter": "sorsa",
        "r": 4,
        "target_modules": ["q_proj", "v_proj"],
        "sorsa": {"gamma": 0.01},
        "learning_rate": 2e-3,
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "max_length": 128,
        "logging_steps": 1,
        "save_strategy": "no",
        "bf16": False,
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
    } | changes
    path.write_text(yaml.safe_dump({key: value for key, value in options.items() if value is not None}))
    return path


def run(command: str, *arguments: Any) -> Any:
    """The command without its launcher, in this process."""
    return train(RecipeParser(command).parse([str(argument) for argument in arguments]))


def losses(trainer: Any) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
