"""KTO, Reward, GRPO and RLOO train a few steps with the regularizer applied: what docs/trl.md's table says was run."""

from __future__ import annotations

from typing import Any

import pytest
import trl
from builders.trl_runs import EXAMPLES, PREFERENCES, logged, options, sorsa_config
from datasets import Dataset
from transformers import AutoModelForSequenceClassification

from sorsa_plugin import gaps
from sorsa_plugin.regularizer.optimizers import innermost
from sorsa_plugin.regularizer.step_hooks import attachment_of
from sorsa_quickstart.answering import BASE, load_base

STEPS = 3


def length_reward(completions: list[str], **kwargs: Any) -> list[float]:
    """A reward that differs between completions."""
    return [float(len(text)) for text in completions]


def rows_of(name: str) -> list[dict[str, Any]]:
    if name == "KTO":
        pairs = ((row["prompt"], row["completion"], True) for row in EXAMPLES[:8])
        negatives = ((row["prompt"], " no", False) for row in EXAMPLES[:8])
        return [{"prompt": p, "completion": c, "label": good} for p, c, good in (*pairs, *negatives)]
    if name == "Reward":
        return [
            {"chosen": row["prompt"] + row["chosen"], "rejected": row["prompt"] + " no"} for row in PREFERENCES[:16]
        ]
    return [{"prompt": row["prompt"]} for row in EXAMPLES[:16]]


def build(name: str, directory: Any, gamma: float) -> Any:
    model, tokenizer = load_base()
    changes: dict[str, Any] = {}
    arguments: dict[str, Any] = {}
    config = sorsa_config(gamma=gamma)
    if name == "Reward":
        model = AutoModelForSequenceClassification.from_pretrained(BASE, num_labels=1)
        model.config.pad_token_id = tokenizer.pad_token_id
        config = sorsa_config(
            gamma=gamma, task_type="SEQ_CLS", target_modules=["q_proj", "v_proj"], modules_to_save=["score"]
        )
    if name in ("GRPO", "RLOO"):
        changes = {"num_generations": 4, "max_completion_length": 8, "temperature": 1.0}
        arguments = {"reward_funcs": length_reward}
    arguments_class = getattr(trl, f"{name}Config")
    return getattr(trl, f"{name}Trainer")(
        model=model,
        args=arguments_class(**options(directory, max_steps=STEPS, learning_rate=3e-3, **changes)),
        train_dataset=Dataset.from_list(rows_of(name)),
        processing_class=tokenizer,
        peft_config=config,
        **arguments,
    )


@pytest.mark.parametrize("name", ["KTO", "Reward", "GRPO", "RLOO"])
def test_the_regularizer_is_applied_once_per_optimizer_step(name, tmp_path):
    """Counted on the optimizer; and with gamma a hundred times larger, the gaps end up smaller than without."""
    regularized, without = build(name, tmp_path / "a", gamma=0.05), build(name, tmp_path / "b", gamma=0.0)
    regularized.train()
    without.train()
    assert attachment_of(innermost(regularized.optimizer)).steps == STEPS
    assert len(logged(regularized, "loss")) == STEPS
    free = sum(gaps(without.model).values())
    assert free > 0.01
    assert sum(gaps(regularized.model).values()) < free
