"""load_best_model_at_end and resuming give what was saved, whatever the adapter is called and whoever added it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from builders.adapters import perturb
from builders.llama import tiny_llama
from builders.trainer_runs import make_trainer, trained_values
from peft import LoraConfig, PeftConfig, get_peft_model
from safetensors.torch import load_file
from transformers import Trainer

from sorsa_plugin import SORSAConfig

OFTEN = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1, "learning_rate": 1e-2}
FIRST_IS_BEST = {"load_best_model_at_end": True, "metric_for_best_model": "train_steps", "greater_is_better": False}


def config() -> SORSAConfig:
    return SORSAConfig(r=4, target_modules=["q_proj"], gamma=1e-4)


def wrapped(name: str) -> Any:
    model = get_peft_model(tiny_llama(layers=1), config(), adapter_name=name)
    perturb(model, name)
    return model


def added(name: str, peft_config: PeftConfig | None = None) -> Any:
    """With transformers' own call."""
    model = tiny_llama(layers=1)
    model.add_adapter(peft_config or config(), adapter_name=name)
    perturb(model, name)
    return model


def trainer_of(model: Any, directory: Path, **options: Any) -> Trainer:
    """Whose "train_steps", where it counts, says that the first checkpoint was the best."""
    trainer = make_trainer(model, directory, **OFTEN | options)
    evaluate = trainer.evaluate
    trainer.evaluate = lambda *args, **kwargs: (
        evaluate(*args, **kwargs) | {"eval_train_steps": trainer.state.global_step}
    )
    return trainer


@pytest.mark.parametrize("make", [wrapped, added])
@pytest.mark.parametrize("name", ["default", "mine"])
def test_the_best_checkpoint_is_loaded_whatever_the_adapters_name(
    name: str, make: Callable[[str], Any], tmp_path: Path
) -> None:
    model = make(name)
    trainer = trainer_of(model, tmp_path, **FIRST_IS_BEST)
    trainer.train()
    assert trainer.state.best_model_checkpoint == str(tmp_path / "run" / "checkpoint-1")
    folder = "" if name == "default" or make is added else name
    saved = load_file(tmp_path / "run" / "checkpoint-1" / folder / "adapter_model.safetensors")
    offsets = {key: value for key, value in model.state_dict().items() if key.endswith(f".{name}.dU")}
    assert offsets
    for key, value in offsets.items():
        key = key.replace(f".{name}.", ".")
        assert torch.equal(value, saved[key if make is wrapped else f"base_model.model.{key}"])


@pytest.mark.parametrize("make", [wrapped, added])
@pytest.mark.parametrize("name", ["default", "mine"])
def test_a_resumed_run_ends_as_the_whole_one_does(name: str, make: Callable[[str], Any], tmp_path: Path) -> None:
    whole, resumed = make(name), make(name)
    trainer_of(whole, tmp_path).train()
    trainer = trainer_of(resumed, tmp_path)
    trainer.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    found = trained_values(resumed)
    assert found
    assert all(torch.equal(found[key], value) for key, value in trained_values(whole).items())


def test_what_lora_cannot(tmp_path: Path) -> None:
    """Once it can, transformers finds such adapters, and `sorsa_transformers.adapter_loading` has less to do."""
    lora = added("default", LoraConfig(r=4, target_modules=["q_proj"]))
    with pytest.raises(FileNotFoundError):
        trainer_of(lora, tmp_path, **FIRST_IS_BEST).train()
    with pytest.raises(ValueError, match="Can't find a checkpoint index"):
        trainer_of(added("default", LoraConfig(r=4, target_modules=["q_proj"])), tmp_path).train(
            resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2")
        )
