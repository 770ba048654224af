"""A base model's parameters, read one by one from its files, are those that from_pretrained loads."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
from builders.llama import tied_llama, tiny_llama
from builders.models import tiny_gpt2, tiny_llava, tiny_mixtral, tiny_t5

from sorsa_plugin.errors import BaseFilesError
from sorsa_plugin.files.base_checkpoint import AUTO_CLASSES, BaseFiles
from sorsa_plugin.files.stored_parameters import StoredWeights

CASES = {
    "as-stored": (tiny_llama, "CAUSAL_LM"),
    "tied": (lambda: tied_llama(torch.bfloat16), "CAUSAL_LM"),
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
    tied_llama(torch.bfloat16).save_pretrained(tmp_path)
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
