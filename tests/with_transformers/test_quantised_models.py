"""Whole models that transformers loads quantised: prepared, checkpointed, trained by Trainer and TRL, saved, merged."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from builders.llama import token_batches
from builders.one_layer import assert_same_tensors, perturb
from builders.quantised import CONFIGS, base_tensors, load_llama, save_llama
from datasets import Dataset
from peft import AutoPeftModelForCausalLM, PeftModel, get_peft_model, prepare_model_for_kbit_training
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from sorsa_plugin import SORSAConfig, merge_and_dequantize, save_residual, setup_adapter
from sorsa_plugin.layers.kinds.quantised import SORSAQuantisedLinear
from sorsa_plugin.regularizer.trained_factors import sorsa_layers
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


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_llama(tmp_path_factory.mktemp("llama"))


def adapted(directory: str, kind: str = "4bit", dtype: torch.dtype = torch.float32, **options: Any) -> PeftModel:
    config = SORSAConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", **options)
    return get_peft_model(load_llama(directory, kind, dtype), config)


def arguments(directory: Path, **options: Any) -> TrainingArguments:
    return TrainingArguments(str(directory), **OPTIONS, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", CONFIGS)
def test_a_quantised_model_is_bit_equal_at_init_and_disabled(
    kind: str, dtype: torch.dtype, llama: str, tokens: torch.Tensor
) -> None:
    # in train mode, without dropout: in eval mode bitsandbytes repacks 4-bit weights on some CPUs, adapted ones not
    base = load_llama(llama, kind, dtype).train()
    expected = base(tokens).logits
    model = get_peft_model(base, SORSAConfig(r=4, target_modules="all-linear")).train()
    assert len(sorsa_layers(model)) == 14
    assert all(isinstance(layer, SORSAQuantisedLinear) for layer in sorsa_layers(model))
    assert torch.equal(model(tokens).logits, expected)
    perturb(model)
    assert not torch.equal(model(tokens).logits, expected)
    with model.disable_adapter():
        assert torch.equal(model(tokens).logits, expected)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("kind", CONFIGS)
def test_a_prepared_and_checkpointed_model_trains_and_its_base_does_not(
    kind: str, reentrant: bool, llama: str, tmp_path: Path
) -> None:
    base = prepare_model_for_kbit_training(
        load_llama(llama, kind), gradient_checkpointing_kwargs={"use_reentrant": reentrant}
    )
    model = get_peft_model(base, SORSAConfig(r=4, target_modules="all-linear"))
    before = base_tensors(model)
    trainer = Trainer(model, arguments(tmp_path), train_dataset=token_batches(4))  # one batch, seen three times
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    for layer in sorsa_layers(model):
        assert all(offset.any() for offset in layer.factors("default").parts()[:3]), layer.name
    assert_same_tensors(base_tensors(model), before)


@pytest.mark.parametrize("kind", CONFIGS)
def test_checkpointing_changes_no_gradient(kind: str, llama: str, tokens: torch.Tensor) -> None:
    found = []
    for checkpointing in (False, True):
        model = adapted(llama, kind).train()
        perturb(model)
        model.enable_input_require_grads()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model(tokens, labels=tokens).loss.backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    assert_same_tensors(found[1], found[0])


@pytest.mark.parametrize("kind", CONFIGS)
def test_saved_and_loaded_the_model_is_the_same_to_the_bit(
    kind: str, llama: str, tokens: torch.Tensor, tmp_path: Path
) -> None:
    model = adapted(llama, kind).eval()
    perturb(model)
    expected = model(tokens).logits
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(load_llama(llama, kind), tmp_path)
    assert torch.equal(loaded(tokens).logits, expected)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["base_storage"].startswith(
        {"4bit": "4bit-nf4-64-double", "8bit": "int8"}[kind]
    )


def test_an_adapter_of_a_quantised_base_is_served_on_the_full_one(llama: str, tmp_path: Path) -> None:
    adapted(llama).save_pretrained(tmp_path)
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path)  # quantisation is no property of the adapter
    assert not any(isinstance(layer, SORSAQuantisedLinear) for layer in sorsa_layers(loaded))


@pytest.mark.parametrize("kind", CONFIGS)
def test_merged_and_dequantised_it_is_an_ordinary_checkpoint(
    kind: str, llama: str, tokens: torch.Tensor, tmp_path: Path
) -> None:
    model = adapted(llama, kind).train()
    perturb(model)
    with torch.no_grad():
        expected = model(tokens).logits
    plain = merge_and_dequantize(model, torch.float32)
    plain.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    # int8 multiplies as fp32 does in train mode; sums of up to 128 terms, through two layers
    torch.testing.assert_close(loaded(tokens).logits, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", CONFIGS)
def test_dequantised_a_conv1d_is_one_again(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = {"n_embd": 64, "n_layer": 2, "n_head": 2, "vocab_size": 64, "n_positions": 32, "initializer_range": 0.2}
    GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)).save_pretrained(tmp_path / "full")
    base = load_llama(str(tmp_path / "full"), kind)
    model = get_peft_model(base, SORSAConfig(r=4, target_modules=["c_attn", "attn.c_proj"]))  # and one without
    perturb(model)
    tokens = torch.arange(8)[None]
    plain = merge_and_dequantize(model, torch.float32).eval()
    plain.save_pretrained(tmp_path / "merged")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    torch.testing.assert_close(loaded(tokens).logits, plain(tokens).logits, rtol=0, atol=0)


def test_dequantised_into_bfloat16_the_model_is_what_loads(llama: str, tokens: torch.Tensor, tmp_path: Path) -> None:
    """Buffers included: rounded frequencies turn every later token by another angle."""
    model = prepare_model_for_kbit_training(load_llama(llama, dtype=torch.bfloat16))  # casts the rest to fp32
    model = get_peft_model(model, SORSAConfig(r=4, target_modules="all-linear"))
    perturb(model)
    plain = merge_and_dequantize(model, torch.bfloat16).eval()
    plain.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    for (name, tensor), (_, expected) in zip(plain.named_buffers(), loaded.named_buffers(), strict=True):
        assert tensor.dtype == expected.dtype, name
    assert torch.equal(plain(tokens).logits, loaded(tokens).logits)


# -- TRL -------------------------------------------------------------------------------------------------------------

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


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_a_resumed_run_ends_as_the_uninterrupted_one(adapter: str, llama: str, tmp_path: Path) -> None:
    def trainer(directory: Path, steps: int) -> Trainer:
        options = OPTIONS | {
            "max_steps": steps,
            "save_strategy": "steps",
            "save_steps": 2,
            "lr_scheduler_type": "constant",
        }
        model = get_peft_model(load_llama(llama), trl_config(adapter))
        return Trainer(model, TrainingArguments(str(directory), **options), train_dataset=token_batches(64))

    whole = trainer(tmp_path / "whole", 4)
    whole.train()
    trainer(tmp_path / "parts", 2).train()
    resumed = trainer(tmp_path / "parts", 4)
    resumed.train(resume_from_checkpoint=str(tmp_path / "parts" / "checkpoint-2"))
    for ours, theirs in zip(sorsa_layers(resumed.model), sorsa_layers(whole.model), strict=True):
        assert_same_tensors(ours.factors("default").state_dict(), theirs.factors("default").state_dict())


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_torchaos_linears_come_through_transformers_too(
    adapter: str, llama: str, tokens: torch.Tensor, tmp_path: Path
) -> None:
    pytest.importorskip("torchao")
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    def load(directory: Any, **options: Any) -> Any:
        return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16, **options)

    quantisation = {"quantization_config": TorchAoConfig(Int8WeightOnlyConfig())}
    base = load(llama, **quantisation)
    rounded = base(tokens).logits
    model = get_peft_model(base, trl_config(adapter)).eval()
    assert all(isinstance(layer, SORSAQuantisedLinear) for layer in sorsa_layers(model))
    assert torch.equal(model(tokens).logits, rounded) == (adapter == "sorsa")
    perturb(model)
    expected = model(tokens).logits
    if adapter == "sorsa":
        model.save_pretrained(tmp_path / "adapter")
        loaded = PeftModel.from_pretrained(load(llama, **quantisation), tmp_path / "adapter")
    else:
        save_residual(model, tmp_path / "residual")
        loaded = PeftModel.from_pretrained(load(tmp_path / "residual"), tmp_path / "residual" / "adapter")
    assert torch.equal(loaded(tokens).logits, expected)
    plain = merge_and_dequantize(model, torch.float32)
    # logits are below 1 here; bfloat16 rounds what passes through two layers a dozen times
    torch.testing.assert_close(plain(tokens).logits, expected.float(), rtol=0, atol=12 * 2**-8)
