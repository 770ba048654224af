"""TRL's trainers with `peft_config=SORSAConfig(...)` alone: regularized, DPO's reference exact, a trained adapter's
"ref" copy equal to it and never trained."""

from __future__ import annotations

import math

import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from support import perturb
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from sorsa_plugin import SORSAConfig, gaps
from sorsa_plugin.factors import OFFSETS
from sorsa_plugin.regularizer import model_factors, sorsa_layers
from sorsa_quickstart.answering import load_base
from sorsa_quickstart.task import train_examples
from sorsa_transformers import SORSACallback

EXAMPLES = train_examples(32)
PREFERENCES = [{"prompt": row["prompt"], "chosen": row["completion"], "rejected": " no"} for row in EXAMPLES]


def config() -> SORSAConfig:
    return SORSAConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", gamma=0.01)


def options(directory) -> dict:
    return {
        "output_dir": str(directory),
        "max_steps": 3,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "bf16": False,  # the exact equalities below are fp32's
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
    }


def losses(trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("route", ["peft_config alone", "with the callback"])
def test_sft_trains_and_is_regularized(route, tmp_path):
    def train(peft_config, directory):
        model, tokenizer = load_base()
        trainer = SFTTrainer(
            model,
            args=SFTConfig(**options(directory), gradient_accumulation_steps=2),
            train_dataset=Dataset.from_list(EXAMPLES),
            processing_class=tokenizer,
            peft_config=peft_config,
        )
        if route == "with the callback":
            trainer.add_callback(SORSACallback(trainer))
        trainer.train()
        return trainer

    free = config()
    free.gamma = 0.0
    regularized, without = train(config(), tmp_path / "a"), train(free, tmp_path / "b")
    assert len(losses(regularized)) == 3
    assert losses(regularized)[-1] < losses(regularized)[0]
    assert sum(gaps(regularized.model).values()) < sum(gaps(without.model).values())
    logged = [entry for entry in regularized.state.log_history if "sorsa/gap_mean" in entry]
    assert len(logged) == (3 if route == "with the callback" else 0)


def test_dpos_reference_is_the_untouched_base(tmp_path):
    model, tokenizer = load_base()
    trainer = DPOTrainer(
        model,
        args=DPOConfig(**options(tmp_path)),
        train_dataset=Dataset.from_list(PREFERENCES),
        processing_class=tokenizer,
        peft_config=config(),
    )
    trainer.train()
    # policy and reference are bit-equal, so every margin is 0 and the loss log(2), rounded to fp32
    assert losses(trainer)[0] == float(torch.tensor(math.log(2.0), dtype=torch.float32))
    assert losses(trainer)[-1] < losses(trainer)[0]


def test_dpo_on_a_trained_adapter_refers_to_a_frozen_copy_of_it(tmp_path):
    from peft import get_peft_model

    model, tokenizer = load_base()
    model = get_peft_model(model, config())
    perturb(model, scale=1e-3)
    model.save_pretrained(tmp_path / "adapter")
    model = PeftModel.from_pretrained(load_base()[0], tmp_path / "adapter", is_trainable=True)
    trainer = DPOTrainer(
        model,
        args=DPOConfig(**options(tmp_path / "run")),
        train_dataset=Dataset.from_list(PREFERENCES),
        processing_class=tokenizer,
    )
    layers = sorsa_layers(trainer.model)
    for layer in layers:
        trained, copy = layer.factors("default").state_dict(), layer.factors("ref").state_dict()
        assert all(torch.equal(trained[name], copy[name]) for name in trained)
    assert len(model_factors(trainer.model)) == 2 * len(layers)  # the copy does not count
    before = {layer.name: layer.factors("ref").state_dict()["dU"].clone() for layer in layers}
    trainer.train()
    assert losses(trainer)[0] == float(torch.tensor(math.log(2.0), dtype=torch.float32))
    for layer in layers:
        assert torch.equal(layer.factors("ref").dU, before[layer.name])
        assert any(
            not torch.equal(getattr(layer.factors("default"), n), getattr(layer.factors("ref"), n)) for n in OFFSETS
        )
