"""transformers' own adapter methods, PEFT's functional API and the Auto classes take SORSA as they take LoRA."""

from __future__ import annotations

import re

import pytest
import torch
from builders.adapters import perturb, refuse_to_factorise
from builders.llama import tiny_llama
from peft import (
    AutoPeftModelForCausalLM,
    PeftConfig,
    PeftModel,
    TaskType,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM

from sorsa_plugin import SORSAConfig, SORSAModel, save_adapter
from sorsa_plugin.errors import BaseMismatchError, FactorsNotLoadedError
from sorsa_plugin.files.adapter_format import FROZEN, OFFSETS
from sorsa_plugin.layers.layer import sorsa_layers


def config(**options) -> SORSAConfig:
    return SORSAConfig(**{"r": 3, "target_modules": "all-linear", **options})


@pytest.fixture
def base_directory(tmp_path):
    directory = tmp_path / "base"
    tiny_llama().save_pretrained(directory)
    return directory


def test_auto_peft_model_finds_the_base_and_is_exact(base_directory, tmp_path, tokens, monkeypatch):
    base = AutoModelForCausalLM.from_pretrained(base_directory)
    model = get_peft_model(base, config(task_type=TaskType.CAUSAL_LM)).eval()
    perturb(model)
    model.save_pretrained(tmp_path / "adapter")
    refuse_to_factorise(monkeypatch)
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert torch.equal(loaded(tokens).logits, model(tokens).logits)
    assert PeftConfig.from_pretrained(tmp_path / "adapter").base_model_name_or_path == str(base_directory)


def test_a_causal_model_generates_the_same_tokens_before_and_after_saving(base_directory, tmp_path, tokens):
    base = AutoModelForCausalLM.from_pretrained(base_directory)
    model = get_peft_model(base, config(task_type="CAUSAL_LM")).eval()
    perturb(model, scale=0.5)
    expected = model.generate(input_ids=tokens, max_new_tokens=5, do_sample=False)
    model.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base_directory), tmp_path / "adapter")
    assert torch.equal(loaded.generate(input_ids=tokens, max_new_tokens=5, do_sample=False), expected)


def test_transformers_add_save_and_load_adapter_are_exact(tmp_path, tokens, monkeypatch):
    base = tiny_llama()
    expected = base(tokens).logits
    base.add_adapter(config())
    assert torch.equal(base(tokens).logits, expected)
    perturb(base)
    moved = base(tokens).logits
    assert not torch.equal(moved, expected)
    base.save_pretrained(tmp_path)
    assert len(load_file(tmp_path / "adapter_model.safetensors")) == 14 * 7

    refuse_to_factorise(monkeypatch)
    fresh = tiny_llama()
    fresh.load_adapter(str(tmp_path))
    assert torch.equal(fresh.eval()(tokens).logits, moved)
    fresh.disable_adapters()
    assert torch.equal(fresh(tokens).logits, expected)
    fresh.enable_adapters()
    assert torch.equal(fresh(tokens).logits, moved)


def test_an_adapter_saved_by_peft_loads_in_transformers_and_the_other_way_round(tmp_path, tokens):
    model = get_peft_model(tiny_llama(), config()).eval()
    perturb(model)
    model.save_pretrained(tmp_path / "peft")
    fresh = tiny_llama()
    fresh.load_adapter(str(tmp_path / "peft"))
    assert torch.equal(fresh.eval()(tokens).logits, model(tokens).logits)
    fresh.save_pretrained(tmp_path / "transformers")
    again = PeftModel.from_pretrained(tiny_llama(), tmp_path / "transformers")
    assert torch.equal(again(tokens).logits, model(tokens).logits)


def test_from_pretrained_of_an_adapter_directory_loads_base_and_adapter(base_directory, tmp_path, tokens):
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base_directory), config()).eval()
    perturb(model)
    model.save_pretrained(tmp_path / "adapter")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()
    assert torch.equal(loaded(tokens).logits, model(tokens).logits)


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_the_functional_api_moves_an_adapter_between_models_exactly(tokens, low_cpu_mem_usage):
    source = inject_adapter_in_model(config(), tiny_llama())
    perturb(source)
    state = get_peft_model_state_dict(source)
    assert len(state) == 14 * 7
    assert {name.rsplit(".", 1)[1] for name in state} == {*OFFSETS, *FROZEN}

    target = inject_adapter_in_model(config(), tiny_llama(), low_cpu_mem_usage=low_cpu_mem_usage)
    result = set_peft_model_state_dict(target, state, low_cpu_mem_usage=low_cpu_mem_usage)
    assert not result.unexpected_keys
    assert not [key for key in result.missing_keys if "sorsa_" in key]
    assert torch.equal(target.eval()(tokens).logits, source.eval()(tokens).logits)


def test_the_functional_api_on_a_peft_model_is_exact_and_for_any_adapter_name(tokens):
    models = []
    for name in ("first", "second"):
        models.append(get_peft_model(tiny_llama(), config(), adapter_name=name).eval())
    perturb(models[0], "first")
    set_peft_model_state_dict(
        models[1], get_peft_model_state_dict(models[0], adapter_name="first"), adapter_name="second"
    )
    assert torch.equal(models[1](tokens).logits, models[0](tokens).logits)


def test_an_injected_adapter_on_the_meta_device_says_so_when_used(tokens):
    model = inject_adapter_in_model(config(), tiny_llama(), low_cpu_mem_usage=True)
    assert {tensor.device.type for tensor in get_peft_model_state_dict(model).values()} == {"meta"}
    with pytest.raises(FactorsNotLoadedError):
        model(tokens)


def test_a_model_wholly_on_the_meta_device_is_wrapped_without_a_decomposition(monkeypatch):
    refuse_to_factorise(monkeypatch)
    with torch.device("meta"):
        base = tiny_llama()
    model = get_peft_model(base, config())
    assert {p.device.type for p in model.parameters()} == {"meta"}
    assert len(sorsa_layers(model)) == 14


def test_the_tuner_and_its_layers_are_what_peft_asks_for():
    model = get_peft_model(tiny_llama(), config())
    assert isinstance(model.base_model, SORSAModel)
    status = model.get_model_status()
    assert status.base_model_type == "LlamaForCausalLM"
    assert status.adapter_model_type == "SORSAModel"
    assert status.peft_types == {"default": "SORSA"}
    assert status.num_adapter_layers == 14
    assert status.enabled is True
    assert status.requires_grad == {"default": True}
    assert status.merged_adapters == []
    assert len(model.get_layer_status()) == 14


@pytest.mark.parametrize("autocast_adapter_dtype", [True, False])
def test_on_a_bf16_base_the_frozen_factors_stay_fp32(autocast_adapter_dtype, tokens):
    base = tiny_llama(torch.bfloat16)
    expected = base(tokens).logits
    model = get_peft_model(base, config(), autocast_adapter_dtype=autocast_adapter_dtype)
    for layer in sorsa_layers(model):
        factors = layer.factors("default")
        assert {getattr(factors, name).dtype for name in FROZEN} == {torch.float32}
        offsets = torch.float32 if autocast_adapter_dtype else torch.bfloat16
        assert {getattr(factors, name).dtype for name in OFFSETS} == {offsets}
    assert torch.equal(model(tokens).logits, expected)


# -- transformers' loader assigns tensors itself: the same refusals hold there ---------------------------------------


@pytest.fixture
def peft_directory(tmp_path):
    model = get_peft_model(tiny_llama(), config())
    perturb(model)
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def test_transformers_refuses_another_base_model(peft_directory, tokens):
    other = tiny_llama(seed=1)
    other.load_adapter(str(peft_directory))
    with pytest.raises(BaseMismatchError, match=r"model\.layers\.0\.self_attn\.q_proj"):
        other(tokens)


@pytest.mark.parametrize(
    "lost",
    [*(rf"layers\.1\.mlp\.up_proj\..*{part}$" for part in (*OFFSETS, *FROZEN)), r"layers\.1\.mlp\.up_proj\.", "sorsa_"],
)
def test_transformers_never_runs_an_incomplete_adapter(peft_directory, tokens, lost):
    file = peft_directory / "adapter_model.safetensors"
    tensors = {name: tensor for name, tensor in load_file(file).items() if not re.search(lost, name)}
    save_file(tensors or {"nothing": torch.zeros(1)}, file)
    model = tiny_llama()
    model.load_adapter(str(peft_directory))  # reports what is missing, and leaves it on the meta device
    with pytest.raises(FactorsNotLoadedError, match="factors are awaited"):
        model(tokens)


def test_transformers_loads_a_16_bit_file_as_fp32(tmp_path, tokens):
    model = get_peft_model(tiny_llama(), config()).eval()
    perturb(model)
    save_adapter(model, tmp_path, dtype="bfloat16")
    reference = PeftModel.from_pretrained(tiny_llama(), tmp_path)
    loaded = tiny_llama()
    loaded.load_adapter(str(tmp_path))
    dtypes = {name: t.dtype for name, t in loaded.state_dict().items() if "sorsa_" in name}
    assert set(dtypes.values()) == {torch.float32}
    assert torch.equal(loaded.eval()(tokens).logits, reference(tokens).logits)


def test_names_that_adapt_nothing_are_said_where_others_adapt_something(caplog):
    get_peft_model(tiny_llama(), config(target_modules=["q_proj", "up_prj"]))
    assert "target_modules names up_prj, and no module of that name is adapted." in caplog.text
    caplog.clear()
    for targets in (["q_proj", "mlp.up_proj"], "all-linear", None):
        get_peft_model(tiny_llama(), config(target_modules=targets))
    assert "no module of that name" not in caplog.text


def test_names_of_experts_in_stacks_are_answered_with_the_option_for_them(caplog):
    small = MixtralConfig(hidden_size=16, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
                          num_key_value_heads=2, num_local_experts=2, vocab_size=32)  # fmt: skip
    get_peft_model(MixtralForCausalLM(small), config(target_modules=["q_proj", "down_proj"]))
    assert "names down_proj, and no module of that name is adapted. Stacks of experts are named by" in caplog.text
    assert "target_parameters: ['mlp.experts.down_proj', 'mlp.experts.gate_up_proj']." in caplog.text
