"""A base model's directory or id: what of it is read without its weights, and what cannot be read."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from builders.llama import tied_llama, tiny_llama

from sorsa_plugin.errors import BaseFilesError
from sorsa_plugin.files.base_checkpoint import BaseFiles, empty_model, read_model_config


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
    tied_llama(torch.bfloat16).save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    config = read_model_config(tmp_path)
    assert empty_model(config).dtype == torch.bfloat16
    model = empty_model(config, "CAUSAL_LM", torch.float16)
    assert model.dtype == torch.float16
    assert model.name_or_path == str(tmp_path)
    with pytest.raises(BaseFilesError, match="AutoModelForSeq2SeqLM cannot be made from the config"):
        empty_model(config, "SEQ_2_SEQ_LM")
