"""Merging into files where weights are tied: the adapted model's function is kept, untied only where it must be."""

from __future__ import annotations

import json

import pytest
import torch
from builders.adapters import trained
from builders.llama import TOKENS, tied_llama
from builders.saved import INDEX, stored
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from sorsa_plugin import merge_adapter
from sorsa_plugin.errors import (
    BaseFilesError,
)

# -- tied weights ----------------------------------------------------------------------------------------------------

TIED = {
    "adapted-head": {"target_modules": ["lm_head", "q_proj"]},
    "own-head": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "adapted-embedding": {"target_modules": ["embed_tokens", "q_proj"]},
    "tokens-of-the-head": {"target_modules": ["q_proj"], "trainable_token_indices": {"lm_head": [9, 20]}},
    "own-embedding": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
}


@pytest.mark.filterwarnings("ignore:(Model has `tie_word_embeddings=True`|Model with|Setting)")
@pytest.mark.parametrize("shard_size", ["20KB", "5GB"])
@pytest.mark.parametrize("options", TIED.values(), ids=TIED)
def test_a_change_of_one_of_two_tied_weights_unties_them_as_it_does_in_the_adapted_model(tmp_path, options, shard_size):
    tied_llama().save_pretrained(tmp_path / "base", max_shard_size=shard_size)
    model = trained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), **options)
    model.save_pretrained(tmp_path / "sorsa")
    report = merge_adapter(tmp_path / "base", tmp_path / "sorsa", tmp_path / "merged")
    assert set(report.untied) == {"lm_head.weight", "model.embed_tokens.weight"}
    found, info = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not any(info.values())
    assert found.config.tie_word_embeddings is False
    assert not torch.equal(found.lm_head.weight, found.model.embed_tokens.weight)
    with torch.no_grad():
        logits, exact = model(TOKENS).logits, model.double()(TOKENS).logits
        assert (found(TOKENS).logits - exact).abs().max() <= 8 * (logits - exact).abs().max()  # as above
    if shard_size != "5GB":
        index, shards = json.loads((tmp_path / "merged" / INDEX).read_text()), stored(tmp_path / "merged")
        assert {name: shard for shard, tensors in shards.items() for name in tensors} == index["weight_map"]
        assert index["metadata"]["total_size"] == sum(t.nbytes for tensors in shards.values() for t in tensors.values())


@pytest.mark.filterwarnings("ignore:(Model has `tie_word_embeddings=True`|Model with|Setting)")
def test_shards_that_are_in_a_folder_stay_in_it(tmp_path):
    base, folder = tmp_path / "base", tmp_path / "base" / "weights"
    tied_llama().save_pretrained(base, max_shard_size="20KB")
    model = trained(AutoModelForCausalLM.from_pretrained(base), **TIED["adapted-head"])  # which adds a tensor
    model.save_pretrained(tmp_path / "sorsa")
    merge_adapter(base, tmp_path / "sorsa", tmp_path / "plain")
    folder.mkdir()
    for shard in base.glob("model-*"):
        shard.rename(folder / shard.name)
    index = json.loads((base / INDEX).read_text())
    index["weight_map"] = {name: f"weights/{shard}" for name, shard in index["weight_map"].items()}
    (base / INDEX).write_text(json.dumps(index))
    merge_adapter(base, tmp_path / "sorsa", tmp_path / "merged")
    expected, found = stored(tmp_path / "plain"), stored(tmp_path / "merged" / "weights")
    assert not stored(tmp_path / "merged")
    assert {name: shard for shard, tensors in found.items() for name in tensors} == {
        name: shard for shard, tensors in expected.items() for name in tensors
    }
    assert all(torch.equal(found[shard][name], t) for shard, tensors in expected.items() for name, t in tensors.items())
    _, info = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not any(info.values())


def test_tied_weights_that_stay_alike_stay_tied(tmp_path):
    tied_llama().save_pretrained(tmp_path / "base")
    model = trained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), target_modules=["q_proj"])
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(2)  # as if it had been trained along
    model.save_pretrained(tmp_path / "sorsa", save_embedding_layers=True)
    report = merge_adapter(tmp_path / "base", tmp_path / "sorsa", tmp_path / "merged")
    assert report.replaced
    assert not report.untied
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert found.lm_head.weight is found.model.embed_tokens.weight
    assert torch.equal(found.lm_head.weight, model.get_input_embeddings().weight)
    assert stored(tmp_path / "merged").keys() == stored(tmp_path / "base").keys()


@pytest.mark.filterwarnings("ignore:(Model with|Setting)")
def test_tied_weights_that_are_stored_twice_are_both_written(tmp_path):
    tied_llama().save_pretrained(tmp_path / "base")
    path = tmp_path / "base" / "model.safetensors"
    tensors = load_file(path)
    save_file({**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, path, {"format": "pt"})
    model = trained(tied_llama(), target_modules=["embed_tokens"], ensure_weight_tying=True)
    model.save_pretrained(tmp_path / "sorsa")
    report = merge_adapter(tmp_path / "base", tmp_path / "sorsa", tmp_path / "merged")
    assert report.merged == ("model.embed_tokens",)
    assert not report.untied
    found = load_file(tmp_path / "merged" / "model.safetensors")
    expected = model.merge_and_unload().lm_head.weight
    assert torch.equal(found["lm_head.weight"], expected)
    assert torch.equal(found["model.embed_tokens.weight"], expected)


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
def test_untying_an_encoder_decoder_is_refused(tmp_path):
    torch.manual_seed(0)
    config = T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4, decoder_start_token_id=0)
    T5ForConditionalGeneration(config).save_pretrained(tmp_path / "base")
    model = trained(
        T5ForConditionalGeneration.from_pretrained(tmp_path / "base"),
        target_modules=["q"],
        modules_to_save=["encoder.embed_tokens"],
    )
    model.save_pretrained(tmp_path / "sorsa")
    with pytest.raises(BaseFilesError, match=r"embed_tokens.*T5\w+ cannot hold both.*merge_and_unload"):
        merge_adapter(tmp_path / "base", tmp_path / "sorsa", tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
