"""A base model's files, read tensor by tensor, are what from_pretrained loads."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
import transformers
from builders.llama import tiny_llama
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MixtralConfig,
    MixtralForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from sorsa_plugin.errors import BaseFilesError
from sorsa_plugin.files.base_checkpoint import AUTO_CLASSES, BaseFiles, empty_model, read_model_config
from sorsa_plugin.files.stored_parameters import StoredWeights

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
}


def tied_llama():
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=True)).bfloat16()


def tiny_gpt2():
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=16))


def tiny_mixtral():
    torch.manual_seed(0)
    return MixtralForCausalLM(MixtralConfig(**SIZES, num_local_experts=4))


def tiny_t5():
    """In fp16, where transformers keeps some weights in fp32."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
    return T5ForConditionalGeneration(T5Config(**sizes)).half()


def tiny_llava():
    torch.manual_seed(0)
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    vision |= {"model_type": "clip_vision_model", "image_size": 16, "patch_size": 8, "projection_dim": 32}
    text = {"model_type": "llama", **SIZES}
    return LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=text, image_token_index=63))


CASES = {
    "as-stored": (tiny_llama, "CAUSAL_LM"),
    "tied": (tied_llama, "CAUSAL_LM"),
    "prefix-added": (lambda: tiny_llama().model, "CAUSAL_LM"),
    "prefix-dropped": (tiny_llama, "FEATURE_EXTRACTION"),
    "new-head": (tiny_llama, "SEQ_CLS"),
    "conv1d": (tiny_gpt2, "CAUSAL_LM"),
    "fused-experts": (tiny_mixtral, "CAUSAL_LM"),
    "renamed": (tiny_llava, None),
    "kept-in-fp32": (tiny_t5, "SEQ_2_SEQ_LM"),
}
NEW = {"prefix-added": {"lm_head.weight"}, "new-head": {"score.weight"}}
"""Parameters for which nothing is stored."""


@pytest.mark.parametrize("case", CASES)
def test_every_parameter_is_the_one_that_from_pretrained_loads(tmp_path, case):
    make, task_type = CASES[case]
    made = make()
    made.save_pretrained(tmp_path, max_shard_size="20KB")
    loader = getattr(transformers, AUTO_CLASSES[task_type]) if task_type else type(made)
    expected = loader.from_pretrained(tmp_path).state_dict()
    files = BaseFiles(tmp_path)
    assert len(files.shards) > 1
    model = files.empty_model(task_type)
    assert all(parameter.is_meta for parameter in model.parameters())
    weights = StoredWeights(files, model)
    assert {name for name in expected if name not in weights} == NEW.get(case, set())
    for name in expected.keys() - NEW.get(case, set()):
        found = weights.read(name)
        assert found.dtype == expected[name].dtype, name
        assert torch.equal(found, expected[name]), name
        assert set(weights.sources(name)) <= set(files.names)


def test_a_weight_that_is_stored_as_it_is_has_a_key(tmp_path):
    tied_llama().save_pretrained(tmp_path)
    files = BaseFiles(tmp_path)
    weights = StoredWeights(files, files.empty_model("CAUSAL_LM"))
    assert weights.key("model.layers.1.mlp.up_proj.weight") == "model.layers.1.mlp.up_proj.weight"
    assert weights.key("lm_head.weight") == "model.embed_tokens.weight"
    assert files.headers["model.norm.weight"].shape == (32,)
    assert files.tensor("model.norm.weight").dtype == torch.bfloat16


def test_a_weight_that_is_made_of_several_has_none(tmp_path):
    tiny_mixtral().save_pretrained(tmp_path)
    files = BaseFiles(tmp_path)
    weights = StoredWeights(files, files.empty_model("CAUSAL_LM"))
    name = "model.layers.0.mlp.experts.gate_up_proj"
    assert len(weights.sources(name)) == 8
    with pytest.raises(BaseFilesError, match=r"gate_up_proj is not stored as it is: transformers makes it from .*w1"):
        weights.key(name)


def test_a_parameter_that_is_not_stored_is_named(tmp_path):
    tiny_llama().save_pretrained(tmp_path)
    files = BaseFiles(tmp_path)
    weights = StoredWeights(files, files.empty_model("SEQ_CLS"))
    with pytest.raises(BaseFilesError, match=r"becomes score\.weight of LlamaForSequenceClassification"):
        weights.read("score.weight")


def test_a_weight_of_another_shape_is_refused(tmp_path):
    tiny_llama().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"intermediate_size": 50}))
    files = BaseFiles(tmp_path)
    weights = StoredWeights(files, files.empty_model("CAUSAL_LM"))
    with pytest.raises(BaseFilesError, match=r"stored with shape \(48, 32\); LlamaForCausalLM expects \(50, 32\)"):
        weights.read("model.layers.0.mlp.up_proj.weight")


def truncate(directory):
    shard = next(directory.glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-100])


def quantise(directory):
    config = json.loads((directory / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (directory / "config.json").write_text(json.dumps(config))


def with_option(**options):
    """A damage: config.json with other options."""

    def edit(directory):
        config = directory / "config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | options))

    return edit


def name_a_shard_outside(directory):
    index = directory / "model.safetensors.index.json"
    index.write_text(index.read_text().replace("model-00001", "../model-00001"))


DAMAGE = {
    "truncated": (truncate, "cannot be read .*expected a complete safetensors file"),
    "a-shard-lost": (lambda d: next(d.glob("*.safetensors")).unlink(), r"lacks model-00\d+-of-00\d+\.safetensors"),
    "index-damaged": (
        lambda d: (d / "model.safetensors.index.json").write_text("{"),
        "expected JSON with a weight_map",
    ),
    "index-names-a-shard-outside": (name_a_shard_outside, r"names \.\./model-00001.*, which is outside of"),
    "no-config": (lambda d: (d / "config.json").unlink(), "gives no model config"),
    "config-damaged": (lambda d: (d / "config.json").write_text("{"), "gives no model config"),
    "option-of-another-type": (
        with_option(hidden_size="x"),
        r"gives no model config \(Validation error for field 'hidden_size': TypeError: .* got str",
    ),
    "options-at-odds": (with_option(num_attention_heads=5), r"gives no model config \(.* attention heads \(5\)"),
    "unknown-dtype": (with_option(dtype="float7"), "gives no model config .*float7"),
    "quantised": (quantise, "stored quantised"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_what_cannot_be_read_is_a_sentence(tmp_path, damage):
    spoil, message = DAMAGE[damage]
    tiny_llama().save_pretrained(tmp_path, max_shard_size="20KB")
    spoil(tmp_path)
    with pytest.raises(BaseFilesError, match=message):
        BaseFiles(tmp_path)


def test_other_formats_and_unknown_ids_are_sentences(tmp_path):
    tiny_llama().save_pretrained(tmp_path / "base")
    (tmp_path / "base" / "model.safetensors").unlink()
    torch.save({}, tmp_path / "base" / "pytorch_model.bin")
    with pytest.raises(BaseFilesError, match=r"holds pytorch_model\.bin; expected model\.safetensors"):
        BaseFiles(tmp_path / "base")
    shutil.rmtree(tmp_path / "base")
    for unknown in (str(tmp_path / "nothing"), "nobody/has-this-model"):
        with pytest.raises(BaseFilesError, match="gives no model config"):
            BaseFiles(unknown)


def test_a_model_without_weights_is_made_in_the_dtype_asked_for(tmp_path):
    tied_llama().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    config = read_model_config(tmp_path)
    assert empty_model(config).dtype == torch.bfloat16
    model = empty_model(config, "CAUSAL_LM", torch.float16)
    assert model.dtype == torch.float16
    assert model.name_or_path == str(tmp_path)
    with pytest.raises(BaseFilesError, match="AutoModelForSeq2SeqLM cannot be made from the config"):
        empty_model(config, "SEQ_2_SEQ_LM")
