"""Whole models that transformers loads quantised: prepared, checkpointed, trained by Trainer and TRL, saved, merged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from builders.adapters import assert_same_tensors, perturb
from builders.llama import token_batches
from builders.quantised import CONFIGS, base_tensors, load_llama, save_llama
from peft import AutoPeftModelForCausalLM, PeftModel, get_peft_model, prepare_model_for_kbit_training
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

from sorsa_plugin import SORSAConfig, merge_and_dequantize, save_residual, setup_adapter
from sorsa_plugin.layers.kinds.quantised import SORSAQuantisedLinear
from sorsa_plugin.layers.layer import sorsa_layers

pytest.importorskip("bitsandbytes")


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


ADAPTERS = ("sorsa", "qsorsa")


def trl_config(adapter: str = "sorsa") -> SORSAConfig:
    recipe = {"adapter": adapter, "r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    return setup_adapter(recipe | {adapter: {"gamma": 0.01}}).peft_config


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
