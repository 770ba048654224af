"""TRL's distillation and experimental trainers, for SORSA beside LoRA: they train the adapter, and save it exactly."""

from __future__ import annotations

import copy
import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
import trl
from builders.trl_runs import (
    EXAMPLES,
    METHODS,
    PREFERENCES,
    PROMPTS,
    adapter_config,
    base_of,
    length_reward,
    logged,
    logits_of,
    options,
)
from datasets import Dataset
from peft import PeftModel

from sorsa_quickstart.answering import load_base

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::UserWarning"),  # that the experimental part of TRL is experimental
]

CHATS = [
    {
        "messages": [
            {"role": "user", "content": row["prompt"]},
            {"role": "assistant", "content": row["completion"]},
        ]
    }
    for row in EXAMPLES
]
SOLVED = [{"prompt": row["prompt"], "privileged_context": row["completion"]} for row in EXAMPLES]
REFERRED = [row | {"reference": row["chosen"]} for row in PREFERENCES]
SAMPLED = {"max_completion_length": 8, "num_generations": 4}
GENERATED = {"max_new_tokens": 8, "max_length": 128}

CASES: dict[str, tuple[list[dict[str, Any]], dict[str, Any]]] = {
    "CPO": (PREFERENCES, {}),
    "ORPO": (PREFERENCES, {}),
    "TPO": (REFERRED, {}),
    "GKD": (CHATS, GENERATED),
    "OnlineDPO": (PROMPTS, GENERATED),
    "GMPO": (PROMPTS, SAMPLED),
    "SDFT": (SOLVED, SAMPLED),
    "SDPO": (SOLVED, SAMPLED | {"teacher_model_kind": "base"}),
    "Distillation": (PROMPTS, {"max_completion_length": 8}),
}
"""{trainer: (rows, arguments)}"""
FOLDERS = {"OnlineDPO": "online_dpo"}


def class_of(kind: str, end: str) -> Any:
    name = f"{kind}{end}"
    if kind == "Distillation":  # experimental before 1.14
        return getattr(trl, name, None) or pytest.skip(f"TRL {trl.__version__} has no trl.{name}")
    return getattr(importlib.import_module(f"trl.experimental.{FOLDERS.get(kind, kind.lower())}"), name)


def build(kind: str, method: str, directory: Path, **changes: Any) -> Any:
    rows, own = CASES[kind]
    further: dict[str, Any] = {}
    if kind in ("GKD", "Distillation"):
        further["teacher_model"] = teacher = base_of("SFT")
        teacher.model.norm.weight.data.mul_(1.5)  # surer of its answers: from its equal there is nothing to learn
    if kind in ("OnlineDPO", "GMPO", "SDPO"):
        further["reward_funcs"] = length_reward
    return class_of(kind, "Trainer")(
        model=base_of("SFT"),
        args=class_of(kind, "Config")(**options(directory, learning_rate=3e-3, **own | changes)),
        train_dataset=Dataset.from_list(rows),
        processing_class=load_base()[1],
        peft_config=adapter_config(method),
        **further,
    )


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", CASES)
def test_the_adapter_trains_and_is_saved_exactly(kind: str, method: str, tmp_path: Path) -> None:
    trainer = build(kind, method, tmp_path)
    before = copy.deepcopy(trainer.model.state_dict())
    trainer.train()
    after = trainer.model.state_dict()
    trained = {name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad}
    assert len(logged(trainer, "loss")) == 3
    assert trained
    assert {name for name, tensor in before.items() if not torch.equal(after[name], tensor)} == trained
    trainer.save_model(str(tmp_path / "adapter"))
    loaded = PeftModel.from_pretrained(base_of("SFT"), tmp_path / "adapter")
    assert torch.equal(logits_of(loaded), logits_of(trainer.model))


@pytest.mark.parametrize("kind", ["SDFT", "SDPO"])
def test_trl_averages_teachers_of_lora_alone(kind: str, tmp_path: Path) -> None:
    """SDPO's default. TRL makes the teacher of LoRA's tensors by name, and refuses every other method."""
    trainer = build(kind, "LoRA", tmp_path / "LoRA", teacher_model_kind="ema")
    trainer.train()
    assert "teacher" in trainer.model.peft_config
    with pytest.raises(ValueError, match="teacher_model_kind='ema'` with a non-pure-LoRA PEFT model is not supported"):
        build(kind, "SORSA", tmp_path / "SORSA", teacher_model_kind="ema")
