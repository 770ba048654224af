"""TRL on quantised bases: SFT and DPO train in fp32, resume, and keep the base as the reference."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from builders.adapters import assert_same_tensors, perturb
from builders.quantised import CONFIGS, base_tensors, load_llama
from datasets import Dataset
from peft import PeftModel, get_peft_model
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from sorsa_plugin import SORSAConfig, setup_adapter
from sorsa_plugin.layers.kinds.quantised import SORSAQuantisedLinear
from sorsa_plugin.layers.layer import sorsa_layers
from sorsa_quickstart.answering import BASE
from sorsa_quickstart.task import train_examples
from sorsa_transformers import SORSACallback

pytest.importorskip("bitsandbytes")


LN2 = round(math.log(2.0), 4)

OPTIONS: dict[str, Any] = {
    "max_steps": 3,
    "per_device_train_batch_size": 4,
    "learning_rate": 1e-3,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "use_cpu": True,
    "disable_tqdm": True,
}

EXAMPLES = train_examples(32)
PREFERENCES = [{"prompt": row["prompt"], "chosen": row["completion"], "rejected": " no"} for row in EXAMPLES]


def trl_trainer(
    kind: type,
    model: Any,
    directory: Path,
    config: SORSAConfig | None = None,
    callback: bool = True,
    **options: Any,
) -> Any:
    from sorsa_quickstart.answering import load_base

    arguments_class = {SFTTrainer: SFTConfig, DPOTrainer: DPOConfig}[kind]
    return kind(
        model,
        args=arguments_class(str(directory), **OPTIONS | {"bf16": False} | options),
        train_dataset=Dataset.from_list(EXAMPLES if kind is SFTTrainer else PREFERENCES),
        processing_class=load_base()[1],
        peft_config=config,
        callbacks=[SORSACallback()] if callback else [],
    )


ADAPTERS = ("sorsa", "qsorsa")


def trl_config(adapter: str = "sorsa") -> SORSAConfig:
    recipe = {"adapter": adapter, "r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    return setup_adapter(recipe | {adapter: {"gamma": 0.01}}).peft_config


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointed"])
@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_sft_trains_in_fp32_what_trl_casts_to_bfloat16(
    adapter: str, kind: str, checkpointing: bool, tmp_path: Path
) -> None:
    base = load_llama(str(BASE), kind)
    trainer = trl_trainer(SFTTrainer, base, tmp_path, trl_config(adapter), gradient_checkpointing=checkpointing)
    before = base_tensors(trainer.model)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    for layer in sorsa_layers(trainer.model):
        assert {part.dtype for part in layer.factors("default").parts()} == {torch.float32}
    assert {s.dtype for state in trainer.optimizer.state.values() for s in state.values()} == {torch.float32}
    assert_same_tensors(base_tensors(trainer.model), before)


def test_a_config_alone_resumes_with_the_offsets_of_its_checkpoint(tmp_path: Path) -> None:
    """TRL casts the new adapter's offsets to bfloat16, before the Trainer loads the checkpoint's into them."""
    options = {"callback": False, "save_strategy": "steps", "save_steps": 1, "max_steps": 2}
    trainers = [
        trl_trainer(SFTTrainer, load_llama(str(BASE)), tmp_path, trl_config(), **options)  # type: ignore[arg-type]
        for _ in range(2)
    ]
    whole, resumed = trainers
    whole.train()
    assert {part.dtype for part in sorsa_layers(resumed.model)[0].factors("default").parts()[:3]} == {torch.bfloat16}
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    for ours, theirs in zip(sorsa_layers(resumed.model), sorsa_layers(whole.model), strict=True):
        assert_same_tensors(ours.factors("default").state_dict(), theirs.factors("default").state_dict())


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_dpos_reference_is_the_quantised_base(adapter: str, kind: str, tmp_path: Path) -> None:
    trainer = trl_trainer(DPOTrainer, load_llama(str(BASE), kind), tmp_path, trl_config(adapter))
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    # policy and reference are bit-equal, so every margin is 0 and the loss log(2), to the digits that are logged
    assert round(losses[0], 4) == LN2
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_dpo_on_a_trained_adapter_starts_from_exactly_that(adapter: str, tmp_path: Path) -> None:
    """TRL copies the adapter to "ref", then rounds the trainable one to bfloat16: it is put back as it was."""
    model = get_peft_model(load_llama(str(BASE)), trl_config(adapter))
    perturb(model, scale=1e-2)
    model.save_pretrained(tmp_path / "adapter")
    model = PeftModel.from_pretrained(load_llama(str(BASE)), tmp_path / "adapter", is_trainable=True)
    exact = {layer.name: [part.clone() for part in layer.factors("default").parts()] for layer in sorsa_layers(model)}
    trainer = trl_trainer(DPOTrainer, model, tmp_path / "run")
    for layer in sorsa_layers(trainer.model):
        for name in ("default", "ref"):
            found = layer.factors(name).parts()
            assert all(torch.equal(a, b) for a, b in zip(found, exact[layer.name], strict=True))
    trainer.train()
    assert round(next(e["loss"] for e in trainer.state.log_history if "loss" in e), 4) == LN2


def test_offsets_rounded_after_training_are_reported() -> None:
    from builders.one_layer import adapt, only_layer
    from builders.quantised import quantised_base

    model = adapt(quantised_base("nf4"))
    perturb(model)
    factors = only_layer(model).factors("default")
    factors.cast_offsets(torch.bfloat16)
    with pytest.warns(UserWarning, match="had been rounded to 16 bits"):
        factors.restore_fp32()


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_a_recipes_word_trains_on_four_bits(adapter: str, tmp_path: Path) -> None:
    """`sorsa sft` with TRL's own keys for quantisation; the adapter then loads on the base quantised as it was."""
    from sorsa_trl.recipe import RecipeParser
    from sorsa_trl.train import train

    path = tmp_path / "recipe.yaml"
    recipe = {
        "model_name_or_path": str(BASE),
        "dataset_name": str(Path(__file__).parents[2] / "examples" / "data" / "gsm8k" / "train.jsonl"),
        "output_dir": str(tmp_path / "run"),
        "adapter": adapter,
        "target_modules": "all-linear",
        "r": 4,
        "load_in_4bit": True,
        "use_bnb_nested_quant": True,
        "max_length": 64,
        "bf16": False,
        **OPTIONS,
    }
    path.write_text(yaml.safe_dump(recipe))
    trainer = train(RecipeParser("sft").parse(["--config", str(path)]))
    assert all(isinstance(layer, SORSAQuantisedLinear) for layer in sorsa_layers(trainer.model))
    config = json.loads((tmp_path / "run" / "adapter_config.json").read_text())
    assert config["base_storage"] == "4bit-nf4-64-double"
    assert config["residual_base"] == (adapter == "qsorsa")
    loaded = PeftModel.from_pretrained(load_llama(str(BASE)), tmp_path / "run")
    for ours, theirs in zip(sorsa_layers(loaded), sorsa_layers(trainer.model), strict=True):
        assert_same_tensors(ours.factors("default").state_dict(), theirs.factors("default").state_dict())
        assert torch.equal(ours.base_matrix(), theirs.base_matrix())
