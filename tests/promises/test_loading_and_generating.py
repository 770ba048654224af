"""Adapted models generate, run in pipelines, are offloaded and loaded gradually as models without an adapter are."""

from __future__ import annotations

from contextlib import suppress

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from builders.adapters import perturb
from builders.letters import letter_tokenizer
from builders.llama import tiny_llama
from builders.models import tiny_mixtral
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from transformers import AutoModelForCausalLM, pipeline

from sorsa_plugin import SORSAConfig
from sorsa_plugin.errors import BaseMismatchError, IncompleteAdapterError
from sorsa_plugin.files.adapter_format import FROZEN, OFFSETS
from sorsa_plugin.layers.layer import sorsa_layers

GREEDY = {"min_new_tokens": 6, "max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
EXPERTS = {"target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]}

MODELS = {
    "linear and embedding": (tiny_llama, {"target_modules": ["q_proj", "up_proj", "embed_tokens"]}),
    "experts": (tiny_mixtral, {"target_modules": ["v_proj"], **EXPERTS}),
}


@pytest.fixture(params=MODELS)
def case(request):
    return MODELS[request.param]


def trained(base, **options) -> PeftModel:
    model = get_peft_model(base, SORSAConfig(r=3, task_type="CAUSAL_LM", **options)).eval()
    perturb(model, scale=1.0)
    return model


# -- generation ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("beams", [1, 3])
def test_generation_is_the_same_with_and_without_cache_and_differs_from_the_base(case, beams, tokens):
    make, options = case
    model = trained(make(), **options)
    with_cache = model.generate(input_ids=tokens, num_beams=beams, **GREEDY)
    assert torch.equal(model.generate(input_ids=tokens, num_beams=beams, use_cache=False, **GREEDY), with_cache)
    plain = make().generate(input_ids=tokens, num_beams=beams, **GREEDY)
    assert not torch.equal(plain, with_cache)
    with model.disable_adapter():
        assert torch.equal(model.generate(input_ids=tokens, num_beams=beams, **GREEDY), plain)


def test_beam_search_with_mixed_adapters_gives_each_row_its_own(tokens):
    model = trained(tiny_llama(), target_modules=["q_proj", "up_proj", "embed_tokens"])
    alone = model.generate(input_ids=tokens, num_beams=3, **GREEDY)
    with model.disable_adapter():
        plain = model.generate(input_ids=tokens, num_beams=3, **GREEDY)
    mixed = model.generate(input_ids=tokens, num_beams=3, adapter_names=["default", "__base__"], **GREEDY)
    assert torch.equal(mixed[0], alone[0])
    assert torch.equal(mixed[1], plain[1])


def test_a_pipeline_runs_an_adapted_model(tokens, tmp_path):
    """Feature extraction by ids: the pipeline is given a model, and hands over what the model computes."""
    fast = letter_tokenizer()
    model = trained(tiny_llama(), target_modules="all-linear")
    generate = pipeline("text-generation", model=model, tokenizer=fast)
    (found,) = generate("abcabc", return_tensors=True, **GREEDY)
    ids = fast("abcabc", return_tensors="pt")["input_ids"]
    assert found["generated_token_ids"] == model.generate(input_ids=ids, **GREEDY)[0].tolist()


# -- offloaded and gradually loaded bases ----------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["cpu", "disk"])
def test_a_new_adapter_on_an_offloaded_base_is_the_same_as_on_a_loaded_one(case, where, tokens, tmp_path):
    make, options = case
    expected = trained(make(), **options)
    base = make()
    with torch.no_grad():
        plain = make()(tokens).logits
    if where == "cpu":
        cpu_offload(base, execution_device=torch.device("cpu"))
    else:
        disk_offload(base, str(tmp_path), execution_device=torch.device("cpu"))
    assert base.model.layers[0].self_attn.q_proj.weight.is_meta
    model = get_peft_model(base, SORSAConfig(r=3, task_type="CAUSAL_LM", **options)).eval()
    assert not [layer for layer in sorsa_layers(model) if layer.factors("default").pending]
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, plain)
        perturb(model, scale=1.0)
        assert torch.equal(model(tokens).logits, expected(tokens).logits)
    for one, other in zip(sorsa_layers(model), sorsa_layers(expected), strict=True):
        assert torch.equal(one.factors("default").U0, other.factors("default").U0)
        assert one.base_weight().is_meta


def test_a_saved_adapter_is_checked_against_an_offloaded_base(case, tokens, tmp_path):
    make, options = case
    model = trained(make(), **options)
    model.save_pretrained(tmp_path / "adapter")
    base = make()
    cpu_offload(base, execution_device=torch.device("cpu"))
    loaded = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    with torch.no_grad():
        assert torch.equal(loaded(tokens).logits, model(tokens).logits)
    other = make()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.5)
    cpu_offload(other, execution_device=torch.device("cpu"))
    with pytest.raises(BaseMismatchError):
        PeftModel.from_pretrained(other, tmp_path / "adapter")(tokens)


def test_a_new_adapter_on_a_base_with_a_device_map_is_the_same_as_on_a_loaded_one(tokens, tmp_path):
    """PEFT's own loading onto such a base needs an accelerator: on a CPU it dispatches offloaded weights to it."""
    model = trained(tiny_llama(), target_modules="all-linear")
    tiny_llama().save_pretrained(tmp_path / "base")
    places = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk"}
    places |= {"model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "disk"}
    base = AutoModelForCausalLM.from_pretrained(
        tmp_path / "base", device_map=places, offload_folder=str(tmp_path / "offload")
    )
    assert base.model.layers[1].mlp.up_proj.weight.is_meta
    dispatched = trained(base, target_modules="all-linear")
    with torch.no_grad():
        assert torch.equal(dispatched(tokens).logits, model(tokens).logits)


def test_a_saved_adapter_stays_loaded_where_peft_offloads_it_with_its_base(case, tokens, tmp_path, monkeypatch):
    """PEFT sends the model to the accelerator with `dispatch_model`, which leaves what has no place there on the CPU;
    here all of it, and the CPU is the accelerator."""
    make, options = case
    model = trained(make(), **options)
    model.save_pretrained(tmp_path)
    monkeypatch.setattr("peft.peft_model.dispatch_model", lambda model, **_: cpu_offload(model, torch.device("cpu")))
    base = make()
    base.hf_device_map = {"": "cpu"}
    loaded = PeftModel.from_pretrained(base, tmp_path).eval()
    assert all(layer.get_base_layer().weight.is_meta for layer in sorsa_layers(loaded) if hasattr(layer, "weight"))
    assert not [layer for layer in sorsa_layers(loaded) if layer.factors("default").pending]
    with torch.no_grad():
        assert torch.equal(loaded(tokens).logits, model(tokens).logits)


def test_an_adapter_lies_beside_its_base_wherever_its_file_is_read_to(case, tmp_path):
    """PEFT reads it to the accelerator; the meta device stands for one, though nothing can be copied from there."""
    make, options = case
    trained(make(), **options).save_pretrained(tmp_path)
    config = SORSAConfig.from_pretrained(tmp_path)
    model = get_peft_model(make(), config)
    first = sorsa_layers(model)[0].factors("default")
    assert first.pending
    elsewhere = {name: tensor.to("meta") for name, tensor in get_peft_model_state_dict(model).items()}
    with suppress(BaseMismatchError, IncompleteAdapterError):  # no values
        set_peft_model_state_dict(model, elsewhere)
    assert {getattr(first, name).device.type for name in (*OFFSETS, *FROZEN)} == {"cpu"}


def test_merging_into_an_offloaded_base_unloads_the_merged_weights(tokens):
    model = trained(tiny_llama(), target_modules="all-linear")
    base = tiny_llama()
    cpu_offload(base, execution_device=torch.device("cpu"))
    offloaded = get_peft_model(base, SORSAConfig(r=3, target_modules="all-linear")).eval()
    perturb(offloaded, scale=1.0)
    with torch.no_grad():
        merged = offloaded.merge_and_unload()
        torch.testing.assert_close(merged(tokens).logits, model(tokens).logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("low_cpu_mem_usage", [True, False])
def test_an_adapter_is_loaded_gradually_and_exactly(case, low_cpu_mem_usage, tokens, tmp_path):
    make, options = case
    model = trained(make(), **options)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make(), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage).eval()
    with torch.no_grad():
        assert torch.equal(loaded(tokens).logits, model(tokens).logits)
