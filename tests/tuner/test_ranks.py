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


def test_a_modules_own_rank_that_is_too_large_is_an_error_that_names_the_layer_and_the_way_out():
    with pytest.raises(RankError, match=r"model\.layers\.0\.self_attn\.k_proj.*only 16.*rank_pattern"):
        get_peft_model(tiny_llama(), SORSAConfig(r=2, target_modules=["k_proj"], rank_pattern={"k_proj": 17}))
    get_peft_model(tiny_llama(), SORSAConfig(r=17, target_modules=["k_proj"], rank_pattern={"k_proj": 16}))


NAMED, BY_DEFAULT = {"target_modules": ["k_proj", "q_proj"]}, {"target_modules": None}
EXPRESSION = {"target_modules": r".*\.k_proj"}


@pytest.mark.parametrize("targets", [NAMED, BY_DEFAULT, EXPRESSION, {"target_modules": "all-linear"}], ids=str)
def test_a_rank_for_all_modules_narrows_however_they_were_selected_and_one_line_says_where(targets, caplog, tmp_path):
    model = get_peft_model(tiny_llama(), SORSAConfig(r=20, **targets))
    ranks = {layer.name: layer.factors("default").rank for layer in sorsa_layers(model)}
    narrow = {name: 16 for name in ranks if name.endswith(("k_proj", "v_proj"))}
    assert narrow
    assert ranks == dict.fromkeys(ranks, 20) | narrow
    [line] = [record.getMessage() for record in caplog.records if "narrower" in record.getMessage()]
    assert line.startswith("r is 20, ")
    assert f"the rank is 16 on {next(iter(narrow))}" in line
    config = model.peft_config["default"]
    assert (config.r, config.rank_pattern) == (20, {})  # another model's weights may be wider
    perturb(model)
    model.save_pretrained(tmp_path)
    caplog.clear()
    assert_same_tensors(PeftModel.from_pretrained(tiny_llama(), tmp_path).state_dict(), model.state_dict())
    assert not caplog.records


def test_a_line_on_many_narrow_layers_counts_those_that_it_does_not_name(caplog):
    get_peft_model(tiny_llama(), SORSAConfig(r=1000, target_modules="all-linear"))
    [line] = [record.getMessage() for record in caplog.records if "narrower" in record.getMessage()]
    # of 14 layers, the 4 of k_proj and v_proj have 16 triplets, the others the hidden size
    assert line.endswith("and 7 more.")
    assert "model.layers.1.self_attn.k_proj and 1 more; 32 on" in line


# -- copies ----------------------------------------------------------------------------------------------------------


def test_a_named_layer_of_one_output_narrows_as_one_that_a_wildcard_selects(tmp_path):
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
    named = get_peft_model(base(), SORSAConfig(r=4, target_modules=["0", "1", "2"]))
    assert [layer.factors("default").rank for layer in sorsa_layers(named)] == [4, 1, 1]


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
