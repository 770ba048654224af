"""Short TRL runs on the embedded base, shared by these tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import PeftConfig
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from sorsa_plugin import SORSAConfig
from sorsa_plugin.layers.layer import sorsa_layers
from sorsa_quickstart.answering import load_base
from sorsa_quickstart.task import train_examples

EXAMPLES = train_examples(32)
PREFERENCES = [{"prompt": row["prompt"], "chosen": row["completion"], "rejected": " no"} for row in EXAMPLES]
ROWS: dict[type, list[dict[str, Any]]] = {SFTTrainer: EXAMPLES, DPOTrainer: PREFERENCES}
ARGUMENTS: dict[type, Any] = {SFTTrainer: SFTConfig, DPOTrainer: DPOConfig}


def sorsa_config(**changes: Any) -> SORSAConfig:
    options = {"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM", "gamma": 0.01}
    return SORSAConfig(**options | changes)


def options(directory: Path, **changes: Any) -> dict[str, Any]:
    defaults = {
        "output_dir": str(directory),
        "max_steps": 3,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "save_strategy": "no",
        "bf16": False,  # TRL's default is True; the exact equalities of these tests are fp32's
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
    }
    return defaults | changes


def build(
    kind: type,
    directory: Path,
    peft_config: PeftConfig | None,
    *,
    trainer_class: type | None = None,
    model: Any = None,
    rows: list[dict[str, Any]] | None = None,
    **changes: Any,
) -> Any:
    """A trainer of the given TRL class (or a wrapper of it) on the embedded base."""
    base, tokenizer = load_base()
    return (trainer_class or kind)(
        base if model is None else model,
        args=ARGUMENTS[kind](**options(directory, **changes)),
        train_dataset=Dataset.from_list(ROWS[kind] if rows is None else rows),
        eval_dataset=Dataset.from_list(ROWS[kind][:4]),
        processing_class=tokenizer,
        peft_config=peft_config,
    )


def logged(trainer: Any, key: str) -> list[float]:
    return [entry[key] for entry in trainer.state.log_history if key in entry]


def adapter_tensors(trainer: Any, adapter: str = "default") -> list[torch.Tensor]:
    return [
        tensor.clone()
        for layer in sorsa_layers(trainer.model)
        for tensor in layer.factors(adapter).state_dict().values()
    ]
