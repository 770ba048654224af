"""load_best_model_at_end gives the best checkpoint's values, whatever the adapter is called."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from builders.adapters import perturb
from builders.llama import tiny_llama
from builders.trainer_runs import make_trainer
from peft import get_peft_model
from safetensors.torch import load_file

from sorsa_plugin import SORSAConfig
from sorsa_transformers import SORSACallback


@pytest.mark.parametrize("name", ["default", "mine"])
def test_the_best_checkpoint_is_loaded_whatever_the_adapters_name(name: str, tmp_path: Path) -> None:
    config = SORSAConfig(r=4, target_modules=["q_proj"], gamma=1e-4)
    model = get_peft_model(tiny_llama(layers=1), config, adapter_name=name)
    perturb(model, name)
    often = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    best = {"load_best_model_at_end": True, "metric_for_best_model": "train_steps", "greater_is_better": False}
    trainer = make_trainer(model, tmp_path, callbacks=[SORSACallback()], **often, **best, learning_rate=1e-2)
    evaluate = trainer.evaluate
    trainer.evaluate = lambda *args, **kwargs: (
        evaluate(*args, **kwargs) | {"eval_train_steps": trainer.state.global_step}
    )
    trainer.train()
    first = tmp_path / "run" / "checkpoint-1" / ("" if name == "default" else name) / "adapter_model.safetensors"
    assert trainer.state.best_model_checkpoint == str(tmp_path / "run" / "checkpoint-1")
    saved = load_file(first)
    offsets = {key: value for key, value in model.state_dict().items() if key.endswith(f".{name}.dU")}
    assert offsets
    assert all(torch.equal(value, saved[key.replace(f".{name}.", ".")]) for key, value in offsets.items())
