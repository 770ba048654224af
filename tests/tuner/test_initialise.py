"""Where a new adapter's triplets come from: its own weight, another adapter of the same layer, or chance."""

from __future__ import annotations

import pytest
import torch
from builders.adapters import perturb
from builders.llama import tiny_llama
from builders.one_layer import adapt, inputs, make_base, only_layer
from builders.references import ROUNDOFF, forward_bound, paper_forward
from peft import get_peft_model
from torch import nn

from sorsa_plugin import SORSAConfig, factorise
from sorsa_plugin.layers.layer import sorsa_layers

# -- several adapters ------------------------------------------------------------------------------------------------


def two_adapters(**second) -> tuple[nn.Module, nn.Module]:
    """A layer with adapters "default" of rank 4 and "second" (rank 2 unless told), both exact."""
    model = adapt(make_base(shape=(40, 16)), r=4, svd="exact")
    model.add_adapter("second", SORSAConfig(**{"r": 2, "target_modules": ["proj"], "svd": "exact", **second}))
    return model, only_layer(model)


@pytest.mark.parametrize(
    ("options", "cloned"),
    [
        ({"r": 4}, True),
        ({"r": 2}, True),
        ({"r": 6}, False),
        ({"r": 4, "svd": "randomized"}, False),
        ({"r": 4, "svd_seed": 1}, False),
        ({"r": 4, "svd": "auto", "svd_energy": 0.9}, False),
        ({"r": 4, "init_weights": False}, False),
    ],
    ids=str,
)
def test_a_second_adapter_clones_the_first_exactly_when_its_triplets_are_the_same(options, cloned, monkeypatch):
    factorised = []

    def counting(matrix, rank, **kwargs):
        factorised.append(rank)
        return factorise(matrix, rank, **kwargs)

    monkeypatch.setattr("sorsa_plugin.tuner.initialise.factorise", counting)
    _, layer = two_adapters(**options)
    first, second = layer.factors("default"), layer.factors("second")
    rank = options["r"]
    assert len(factorised) == (1 if cloned or not options.get("init_weights", True) else 2)
    if cloned:
        assert torch.equal(second.U0, first.U0[:, :rank])
        assert torch.equal(second.S0, first.S0[:rank])
        assert torch.equal(second.V0, first.V0[:, :rank])
        assert torch.equal(second.fingerprint, first.fingerprint)
    for mine in second.state_dict().values():
        for theirs in first.state_dict().values():
            assert mine.untyped_storage().data_ptr() != theirs.untyped_storage().data_ptr()


def test_a_clone_takes_the_initial_triplets_of_a_trained_adapter_and_starts_at_the_base():
    base, x = make_base(shape=(40, 16)), inputs(16)
    expected = base(x)
    model = adapt(base)
    perturb(model)
    model.add_adapter("ref", SORSAConfig(r=4, target_modules=["proj"]))
    model.set_adapter("ref")
    assert torch.equal(model(x), expected)
    perturb(model, "ref", seed=8)
    assert not torch.equal(*(only_layer(model).get_factors(name)[0] for name in ("default", "ref")))


def test_initial_energy_is_each_weights_share_in_its_best_triplets():
    base = tiny_llama()
    base.model.layers[1].mlp.down_proj.weight.data.zero_()
    model = get_peft_model(base, SORSAConfig(r=4, target_modules=["q_proj", "down_proj"]))
    found = model.initial_energy()
    assert found.pop("model.layers.1.mlp.down_proj") == 1.0  # all of nothing
    layers = [layer for layer in sorsa_layers(model) if layer.base_matrix().any()]
    assert list(found) == [layer.name for layer in layers]
    for layer in layers:
        S64 = torch.linalg.svdvals(layer.base_matrix().detach().double())
        expected = float(S64[:4].square().sum() / S64.square().sum())
        assert found[layer.name] == pytest.approx(expected, rel=4 * 32 * 48 * ROUNDOFF[torch.float32])


@pytest.mark.parametrize("fold", [False, True])
def test_initial_energy_is_of_the_base_weight_while_an_adapter_is_merged(fold):
    model = get_peft_model(tiny_llama(), SORSAConfig(r=4, target_modules=["q_proj", "down_proj"]))
    before = model.initial_energy()
    perturb(model, scale=1.0)
    if fold:
        model.fold()
    model.merge_adapter()
    assert model.initial_energy() == before


# -- options ---------------------------------------------------------------------------------------------------------


def test_random_weights_change_the_output_and_two_adapters_differ():
    base, x = make_base(), inputs(24)
    expected = base(x)
    model = adapt(base, init_weights=False)
    model.add_adapter("second", SORSAConfig(r=4, target_modules=["proj"], init_weights=False))
    layer = only_layer(model)
    assert not torch.allclose(model(x), expected)
    assert not torch.equal(layer.factors("default").dU, layer.factors("second").dU)
    assert ((model(x).detach().double() - paper_forward(layer, x)).abs() <= forward_bound(layer, x)).all()
