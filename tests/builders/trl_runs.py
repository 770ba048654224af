"""Short runs of TRL's trainers on the embedded base: of SORSA, and of LoRA as a control."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import trl
from datasets import Dataset
from peft import LoraConfig, PeftConfig
from transformers import AutoModelForSequenceClassification

from sorsa_plugin import SORSAConfig
from sorsa_plugin.layers.layer import sorsa_layers
from sorsa_quickstart.answering import BASE, load_base
from sorsa_quickstart.task import train_examples

METHODS = ("LoRA", "SORSA")
SAMPLING = ("GRPO", "RLOO")
"""Trainers that generate completions and score them with a reward function."""
TRAINERS = ("SFT", "DPO", "KTO", "Reward", *SAMPLING)

EXAMPLES = train_examples(32)
PREFERENCES = [{"prompt": row["prompt"], "chosen": row["completion"], "rejected": " no"} for row in EXAMPLES]
JUDGED = [
    {"prompt": row["prompt"], "completion": completion, "label": good}
    for good in (True, False)
    for row in EXAMPLES[:8]
    for completion in [row["completion"] if good else " no"]
]
RANKED = [
    {"chosen": row["prompt"] + row["chosen"], "rejected": row["prompt"] + row["rejected"]} for row in PREFERENCES[:16]
]
PROMPTS = [{"prompt": row["prompt"]} for row in EXAMPLES[:16]]
ROWS: dict[str, list[dict[str, Any]]] = {"SFT": EXAMPLES, "DPO": PREFERENCES, "KTO": JUDGED, "Reward": RANKED}


def sorsa_config(**changes: Any) -> SORSAConfig:
    options = {"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM", "gamma": 0.01}
    return SORSAConfig(**options | changes)


def adapter_config(method: str, trainer: str = "SFT", **changes: Any) -> PeftConfig:
    """A method's config, on the same modules for each. A reward model trains its new `score` in full."""
    options: dict[str, Any] = {"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    if trainer == "Reward":
        options |= {"task_type": "SEQ_CLS", "target_modules": ["q_proj", "v_proj"], "modules_to_save": ["score"]}
    options |= changes
    return sorsa_config(**options) if method == "SORSA" else LoraConfig(**options)


def base_of(trainer: str) -> Any:
    """A new base model for a trainer. A reward model's one output has weights that are always the same."""
    model, tokenizer = load_base()
    if trainer == "Reward":
        model = AutoModelForSequenceClassification.from_pretrained(BASE, num_labels=1, dtype=torch.float32)
        model.config.pad_token_id = tokenizer.pad_token_id
        model.score.weight.data.fill_(0.01)
    return model


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


def length_reward(completions: list[str], **kwargs: Any) -> list[float]:
    """A reward that differs between completions."""
    return [float(len(text)) for text in completions]


def build(
    kind: str,
    directory: Path,
    peft_config: PeftConfig | None,
    *,
    trainer_class: type | None = None,
    model: Any = None,
    tokenizer: Any = None,
    rows: list[dict[str, Any]] | None = None,
    **changes: Any,
) -> Any:
    """One of `TRAINERS` (or a wrapper of it) on the embedded base, with `changes` to its arguments."""
    rows = ROWS.get(kind, PROMPTS) if rows is None else rows
    if kind in SAMPLING:
        changes = {"num_generations": 4, "max_completion_length": 8, "temperature": 1.0} | changes
    return (trainer_class or getattr(trl, f"{kind}Trainer"))(
        base_of(kind) if model is None else model,
        args=getattr(trl, f"{kind}Config")(**options(directory, **changes)),
        train_dataset=Dataset.from_list(rows),
        eval_dataset=Dataset.from_list(rows[:4]),
        processing_class=load_base()[1] if tokenizer is None else tokenizer,
        peft_config=peft_config,
        **({"reward_funcs": length_reward} if kind in SAMPLING else {}),
    )


def logged(trainer: Any, key: str) -> list[float]:
    return [entry[key] for entry in trainer.state.log_history if key in entry]


@torch.no_grad()
def logits_of(model: Any) -> torch.Tensor:
    """Of one sentence; a reward model's is one number."""
    return model.eval()(**load_base()[1]("Tom had 3 apples", return_tensors="pt")).logits


def adapter_tensors(trainer: Any, adapter: str = "default") -> list[torch.Tensor]:
    return [
        tensor.clone()
        for layer in sorsa_layers(trainer.model)
        for tensor in layer.factors(adapter).state_dict().values()
    ]
