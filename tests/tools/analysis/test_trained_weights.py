"""What is read of an adapter or a model, one weight at a time, is what PEFT merges into the whole model."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from builders.adapters import perturb
from builders.llama import tied_llama, tiny_llama
from builders.models import tiny_gpt2, tiny_mixtral
from peft import (
    HRAConfig,
    IA3Config,
    LNTuningConfig,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    OFTConfig,
    PeftModel,
    PromptTuningConfig,
    RandLoraConfig,
    get_peft_model,
)
from safetensors.torch import load_file, save_file

from sorsa_plugin import SORSAConfig
from sorsa_plugin.errors import BaseFilesError, BaseMismatchError, ForeignAdapterError, IncompleteAdapterError
from sorsa_plugin.tools.analysis.trained_weights import BaseWeights, complete_checkpoints, open_trained

TARGETS = ["q_proj", "v_proj", "down_proj"]

ADAPTERS = {
    "sorsa": (tiny_llama, SORSAConfig(r=3, target_modules=TARGETS, rank_pattern={"v_proj": 5})),
    "sorsa-conv1d": (tiny_gpt2, SORSAConfig(r=3, target_modules=["c_attn"], fan_in_fan_out=True)),
    "sorsa-and-head": (tiny_llama, SORSAConfig(r=3, target_modules=["q_proj"], modules_to_save=["lm_head"])),
    "sorsa-embedding-and-head": (tiny_llama, SORSAConfig(r=3, target_modules=["embed_tokens", "lm_head"])),
    "sorsa-matrix-parameter": (tiny_llama, SORSAConfig(r=3, target_modules=[], target_parameters=["up_proj.weight"])),
    "lora": (tiny_llama, LoraConfig(r=3, lora_alpha=6, target_modules="all-linear", rank_pattern={"k_proj": 5})),
    "lora-conv1d": (tiny_gpt2, LoraConfig(r=3, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True)),
    "dora": (tiny_llama, LoraConfig(r=3, use_dora=True, target_modules=TARGETS)),
    "pissa": (tiny_llama, LoraConfig(r=3, init_lora_weights="pissa", target_modules=TARGETS)),
    "olora": (tiny_llama, LoraConfig(r=3, init_lora_weights="olora", target_modules=TARGETS)),
    "one-layer": (tiny_llama, LoraConfig(r=3, target_modules=TARGETS, layers_to_transform=[1])),
    "loha": (tiny_llama, LoHaConfig(r=3, target_modules=TARGETS)),
    "lokr": (tiny_llama, LoKrConfig(r=3, target_modules=TARGETS)),
    "oft": (tiny_llama, OFTConfig(oft_block_size=8, r=0, target_modules=["q_proj", "o_proj"])),
    "hra": (tiny_llama, HRAConfig(r=4, target_modules=TARGETS)),
    "ia3": (tiny_llama, IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"])),
}


@torch.no_grad()
def move(model) -> None:
    """Every trained parameter, by about a hundredth."""
    if any(config.peft_type == "SORSA" for config in model.peft_config.values()):
        perturb(model, scale=0.05)
    generator = torch.Generator().manual_seed(5)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and "sorsa_factors" not in name:
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))


def save(directory, make, config):
    """Base and trained adapter; the model."""
    make().save_pretrained(directory / "base")
    model = get_peft_model(make(), config)
    move(model)
    model.save_pretrained(directory / "adapter")
    return model


@pytest.mark.parametrize("case", ADAPTERS)
def test_an_adapters_weights_are_those_that_peft_merges(tmp_path, case):
    make, config = ADAPTERS[case]
    save(tmp_path, make, config)
    base = BaseWeights(tmp_path / "base")
    trained = open_trained(tmp_path / "adapter", base)
    model = PeftModel.from_pretrained(make(), tmp_path / "adapter")
    adapted = {
        name.removeprefix("base_model.model.") for name, _ in model.named_modules() if name.endswith("base_layer")
    }
    merged = model.merge_and_unload()
    names = {name.removesuffix(".base_layer") for name in adapted} | set(config.modules_to_save or [])
    assert set(trained.modules) == names
    for name in trained.modules:
        expected = merged.get_submodule(name).weight
        found = trained.read(name).weight
        assert found.dtype == torch.float32
        # one merge in fp32 each, from the same numbers in the same order
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)
        assert not torch.allclose(found, base.read(name), atol=1e-4), f"{name} has not moved"


@pytest.mark.filterwarnings("ignore:(Model with|Setting)")
def test_a_tied_embedding_and_trained_tokens_are_those_that_peft_merges(tmp_path):
    embedding, q_proj = "model.embed_tokens", "model.layers.0.self_attn.q_proj"
    one, two = [3, 9], {"embed_tokens": [3, 9], "lm_head": [5]}
    cases = {
        "tied": (tied_llama, {"target_modules": ["lm_head"], "ensure_weight_tying": True}, [embedding]),
        "tied-too": (tied_llama, {"target_modules": ["embed_tokens"], "ensure_weight_tying": True}, [embedding]),
        "tokens": (tied_llama, {"target_modules": [q_proj], "trainable_token_indices": one}, [embedding, q_proj]),
        "tokens-of-two": (
            tiny_llama,
            {"target_modules": [q_proj], "trainable_token_indices": two},
            [embedding, q_proj, "lm_head"],
        ),
    }
    for case, (make, options, names) in cases.items():
        save(tmp_path / case, make, SORSAConfig(r=3, **options))
        base = BaseWeights(tmp_path / case / "base")
        trained = open_trained(tmp_path / case / "adapter", base)
        merged = PeftModel.from_pretrained(make(), tmp_path / case / "adapter").merge_and_unload()
        assert sorted(trained.modules) == sorted(names)
        for name in trained.modules:
            expected = merged.get_submodule(name).weight
            torch.testing.assert_close(trained.read(name).weight, expected, rtol=1e-6, atol=1e-7)
            assert not torch.allclose(trained.read(name).weight, base.read(name), atol=1e-4), name


def test_adapted_parameters_that_are_no_modules_weight_are_refused(tmp_path):
    experts = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    save(tmp_path, tiny_mixtral, SORSAConfig(r=3, target_modules=["q_proj"], target_parameters=experts))
    with pytest.raises(ForeignAdapterError, match=r"no module's own weight \(experts.*`sorsa inspect`"):
        open_trained(tmp_path / "adapter", BaseWeights(tmp_path / "base"))


def test_an_untrained_adapter_leaves_every_weight_as_it_is(tmp_path):
    tiny_llama(torch.bfloat16).save_pretrained(tmp_path / "base")
    model = get_peft_model(tiny_llama(torch.bfloat16), SORSAConfig(r=3, target_modules="all-linear"))
    model.save_pretrained(tmp_path / "adapter")
    base = BaseWeights(tmp_path / "base")
    trained = open_trained(tmp_path / "adapter", base)
    assert trained.modules == base.linear_modules()
    for name in trained.modules:
        assert torch.equal(trained.read(name).weight, base.read(name))


def test_the_condition_of_the_trained_product_is_that_of_its_dense_form(tmp_path):
    def condition(product):
        values = torch.linalg.svdvals(product.detach().double())[:3]
        return float(values[0] / values[-1])

    model = save(tmp_path, tiny_llama, SORSAConfig(r=3, target_modules=["q_proj"]))
    name = "model.layers.0.self_attn.q_proj"
    layer = model.base_model.model.get_submodule(name)
    found = open_trained(tmp_path / "adapter", BaseWeights(tmp_path / "base")).read(name)
    U, S, V = layer.get_factors()
    factors = layer.factors("default")
    assert found.principal_before == pytest.approx(condition((factors.U0 * factors.S0) @ factors.V0.T), rel=1e-5)
    assert found.principal_after == pytest.approx(condition((U * S) @ V.T), rel=1e-5)

    shutil.rmtree(tmp_path / "adapter")
    for start, known in (("pissa", True), (True, False)):
        config = LoraConfig(r=3, init_lora_weights=start, target_modules=["q_proj"])
        fresh = get_peft_model(tiny_llama(), config).base_model.model.get_submodule(name)
        before = condition(fresh.lora_B["default"].weight @ fresh.lora_A["default"].weight) if known else None
        layer = save(tmp_path, tiny_llama, config).base_model.model.get_submodule(name)
        found = open_trained(tmp_path / "adapter", BaseWeights(tmp_path / "base")).read(name)
        after = condition(layer.lora_B["default"].weight @ layer.lora_A["default"].weight)
        assert found.principal_before == (pytest.approx(before, rel=1e-4) if known else None)
        assert found.principal_after == pytest.approx(after, rel=1e-4)


def test_a_whole_model_is_read_as_it_is_stored(tmp_path):
    tiny_llama(torch.bfloat16).save_pretrained(tmp_path / "base")
    tuned = tiny_llama(seed=9)
    tuned.save_pretrained(tmp_path / "tuned")
    base = BaseWeights(tmp_path / "base")
    trained = open_trained(tmp_path / "tuned", base)
    assert "lm_head" not in trained.modules
    assert len(trained.modules) == 14
    for name in trained.modules:
        assert torch.equal(trained.read(name).weight, tuned.get_submodule(name).weight)


def test_another_models_weights_are_named_errors(tmp_path):
    save(tmp_path, tiny_llama, SORSAConfig(r=3, target_modules=["q_proj"]))
    tiny_llama(seed=1).save_pretrained(tmp_path / "other")
    trained = open_trained(tmp_path / "adapter", BaseWeights(tmp_path / "other"))
    with pytest.raises(BaseMismatchError, match="was not trained on this base model"):
        trained.read(trained.modules[0])
    tiny_gpt2().save_pretrained(tmp_path / "gpt2")
    with pytest.raises(ForeignAdapterError, match="belongs to no module of GPT2LMHeadModel"):
        open_trained(tmp_path / "adapter", BaseWeights(tmp_path / "gpt2"))
    whole = open_trained(tmp_path / "gpt2", BaseWeights(tmp_path / "base"))
    with pytest.raises(BaseFilesError, match=r"No tensor in .*gpt2 becomes"):
        whole.read(whole.modules[0])


def test_adapters_that_cannot_be_read_layer_by_layer_are_refused(tmp_path):
    save(tmp_path, tiny_llama, RandLoraConfig(r=3, target_modules=["q_proj"], save_projection=True))
    base = BaseWeights(tmp_path / "base")
    with pytest.raises(
        ForeignAdapterError, match=r"base_model\.randlora_.*layers share tensors: then merge it with PEFT"
    ):
        open_trained(tmp_path / "adapter", base)
    prompt = get_peft_model(tiny_llama(), PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"))
    prompt.save_pretrained(tmp_path / "prompt")
    with pytest.raises(ForeignAdapterError, match="PROMPT_TUNING adapter, which changes no weight"):
        open_trained(tmp_path / "prompt", base)
    norms = get_peft_model(tiny_llama(), LNTuningConfig(target_modules=["input_layernorm"]))
    norms.save_pretrained(tmp_path / "norms")
    with pytest.raises(ForeignAdapterError, match="norms holds trained vectors alone"):
        open_trained(tmp_path / "norms", base)
    with pytest.raises(ForeignAdapterError, match="holds neither adapter_config"):
        open_trained(tmp_path, base)


def test_damaged_adapters_are_named_errors(tmp_path):
    save(tmp_path, tiny_llama, LoraConfig(r=3, target_modules=["q_proj"]))
    base = BaseWeights(tmp_path / "base")
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(path)
    whole = path.read_bytes()

    save_file(
        {name: tensor for name, tensor in tensors.items() if "layers.0.self_attn.q_proj.lora_B" not in name}, path
    )
    with pytest.raises(IncompleteAdapterError, match=r"layers\.0\.self_attn\.q_proj .*absent .*lora_B"):
        open_trained(tmp_path / "adapter", base).read("model.layers.0.self_attn.q_proj")
    path.write_bytes(whole[:-50])
    with pytest.raises(IncompleteAdapterError, match="expected a complete safetensors file"):
        open_trained(tmp_path / "adapter", base)
    path.write_bytes(whole)
    config = tmp_path / "adapter" / "adapter_config.json"
    options = json.loads(config.read_text())
    for text in ("{", json.dumps(options | {"peft_type": "NEWEST"})):
        config.write_text(text)
        with pytest.raises(IncompleteAdapterError, match="cannot be read as an adapter's configuration"):
            open_trained(tmp_path / "adapter", base)


def test_checkpoints_are_in_the_order_of_their_steps_and_complete(tmp_path, caplog):
    for step in (100, 20, 3, 7, 8):
        checkpoint = tmp_path / f"checkpoint-{step}"
        checkpoint.mkdir()
        save_file({"dU": torch.ones(4, 3)}, checkpoint / "adapter_model.safetensors")
        (checkpoint / "trainer_state.json").write_text(f'{{"global_step": {step}}}')
    (tmp_path / "checkpoint-7" / "trainer_state.json").unlink()
    truncated = tmp_path / "checkpoint-8" / "adapter_model.safetensors"
    truncated.write_bytes(truncated.read_bytes()[:-1])
    (tmp_path / "checkpoint-best").mkdir()
    assert list(complete_checkpoints(tmp_path)) == [3, 20, 100]
    for step in (7, 8):
        assert f"checkpoint-{step} is incomplete" in caplog.text
    with pytest.raises(ForeignAdapterError, match="holds no complete checkpoint-N directory"):
        complete_checkpoints(tmp_path / "checkpoint-3")
