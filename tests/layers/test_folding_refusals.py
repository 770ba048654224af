"""What cannot be folded, and what a folded model does not do: each with a sentence, and nothing changed."""

from __future__ import annotations

import pytest
from builders.adapters import assert_same_tensors, snapshot
from builders.llama import tiny_llama
from builders.one_layer import adapt, inputs, make_base, only_layer
from peft import PeftModel, get_peft_model
from torch import nn

from sorsa_plugin import SORSAConfig
from sorsa_plugin.errors import FoldError
from sorsa_plugin.layers.layer import sorsa_layers


class Tied(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.proj, self.other = nn.Linear(8, 8), nn.Linear(8, 8)
        self.other.weight = self.proj.weight if how == "same" else nn.Parameter(self.proj.weight.detach()[:])


def folding_refused(model: PeftModel, message: str) -> None:
    before = snapshot(model)
    with pytest.raises(FoldError, match=message):
        model.fold()
    assert_same_tensors(snapshot(model), before)
    assert all(layer.weight_state.is_whole for layer in sorsa_layers(model))


@pytest.mark.parametrize("how", ["same", "storage"])
def test_a_shared_weight_is_refused(how: str) -> None:
    model = get_peft_model(Tied(how), SORSAConfig(r=2, target_modules=["proj"]))
    folding_refused(model, r"proj cannot be folded: it shares its weight with \S*other")


def test_several_adapters_are_refused() -> None:
    model = adapt(make_base())
    model.add_adapter("ref", SORSAConfig(r=2, target_modules=["proj"]))
    folding_refused(model, r"it has 2 adapters \(default, ref\); expected one")


def test_dropout_is_refused() -> None:
    folding_refused(adapt(make_base(), sorsa_dropout=0.1), "its sorsa_dropout is not zero")


def test_a_merged_adapter_is_refused() -> None:
    model = adapt(make_base())
    model.merge_adapter()
    folding_refused(model, r"merged into it; call unmerge_adapter\(\) first")


def test_a_weight_that_trains_is_refused() -> None:
    model = adapt(make_base())
    only_layer(model).get_base_layer().weight.requires_grad_(True)
    folding_refused(model, "its weight trains, and unfolding would lose what it learned")


@pytest.mark.parametrize("engine", ["FSDP", "DEEPSPEED"])
def test_sharded_engines_are_refused(engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapt(make_base())
    monkeypatch.setenv(f"ACCELERATE_USE_{engine}", "true")
    folding_refused(model, f"{engine} shards the weights")


def test_an_embedding_is_refused_before_any_layer_is_folded() -> None:
    model = get_peft_model(tiny_llama(), SORSAConfig(r=4, target_modules=["q_proj", "lm_head"]))
    folding_refused(model, "lm_head cannot be folded: PEFT saves embeddings")


def test_a_kind_without_a_folded_form_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapt(make_base())
    monkeypatch.setattr(type(only_layer(model)), "foldable", False)
    folding_refused(model, "its kind has no folded form")


def test_what_a_folded_model_refuses() -> None:
    model = adapt(make_base()).eval()
    model.fold()
    with pytest.raises(FoldError, match=r"'ref' cannot be added beside 'default'. Call unfold\(\) first"):
        model.add_adapter("ref", SORSAConfig(r=2, target_modules=["proj"]))
    with pytest.raises(FoldError, match="while the model is folded"):
        model(inputs(24), adapter_names=["default"] * 5)
    model.merge_adapter()
    with pytest.raises(FoldError, match="is merged, and unfolding would lose the change"):
        model.unfold()
