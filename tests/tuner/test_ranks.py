"""The rank of each layer: patterns, narrow weights, and what is too large."""

from __future__ import annotations

import pytest
import torch
from builders.adapters import assert_same_tensors, perturb
from builders.llama import tiny_llama
from peft import PeftModel, get_peft_model
from torch import nn

from sorsa_plugin import SORSAConfig, export_lora
from sorsa_plugin.errors import RankError
from sorsa_plugin.layers.layer import sorsa_layers

# -- several adapters ------------------------------------------------------------------------------------------------


def test_rank_pattern_gives_modules_their_own_rank():
    config = SORSAConfig(r=4, target_modules="all-linear", rank_pattern={"q_proj": 2, r"layers\.1\.mlp\.down_proj": 7})
    ranks = {layer.name: layer.factors("default").rank for layer in sorsa_layers(get_peft_model(tiny_llama(), config))}
    assert {name: rank for name, rank in ranks.items() if rank != 4} == {
        "model.layers.0.self_attn.q_proj": 2,
        "model.layers.1.self_attn.q_proj": 2,
        "model.layers.1.mlp.down_proj": 7,
    }
    assert len(ranks) == 14


def test_a_rank_too_large_is_an_error_that_names_the_layer_and_the_way_out():
    with pytest.raises(RankError, match=r"model\.layers\.0\.self_attn\.k_proj.*only 16.*rank_pattern"):
        get_peft_model(tiny_llama(), SORSAConfig(r=17, target_modules=["k_proj"]))
    get_peft_model(tiny_llama(), SORSAConfig(r=17, target_modules=["k_proj"], rank_pattern={"k_proj": 16}))


# -- copies ----------------------------------------------------------------------------------------------------------


def test_all_linear_narrows_the_rank_where_a_weight_is_narrower_and_a_named_module_is_refused(tmp_path):
    def base():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 1), nn.Linear(1, 8))

    model = get_peft_model(base(), SORSAConfig(r=4, target_modules="all-linear"))
    assert [layer.factors("default").rank for layer in sorsa_layers(model)] == [4, 1, 1]
    perturb(model)
    model.save_pretrained(tmp_path)
    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(1))
    loaded = PeftModel.from_pretrained(base(), tmp_path)
    assert torch.equal(loaded(x), model(x))
    with pytest.raises(RankError, match="only 1 singular triplets"):
        get_peft_model(base(), SORSAConfig(r=4, target_modules=["0", "1", "2"]))


@pytest.mark.parametrize("narrow_first", [True, False])
def test_a_narrowed_rank_is_that_of_one_module_and_not_of_others_whose_names_end_alike(narrow_first, tmp_path):
    def base():
        torch.manual_seed(0)
        parts = [("head", nn.Linear(8, 2)), ("block", nn.ModuleDict({"head": nn.Linear(8, 8)}))]
        return nn.ModuleDict(dict(parts if narrow_first else parts[::-1]))

    model = get_peft_model(base(), SORSAConfig(r=4, target_modules="all-linear"))
    expected = {"head": 2, "block.head": 4}
    assert {layer.name: layer.factors("default").rank for layer in sorsa_layers(model)} == expected
    perturb(model)
    model.save_pretrained(tmp_path / "sorsa")
    assert_same_tensors(PeftModel.from_pretrained(base(), tmp_path / "sorsa").state_dict(), model.state_dict())
    report = export_lora(tmp_path / "sorsa", tmp_path / "lora")
    assert {layer.name: layer.rank for layer in report.layers} == {name: 2 * rank for name, rank in expected.items()}
