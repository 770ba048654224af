"""What holds for every layer kind: bit-equal at init, right in float64, merged and unmerged, saved and loaded."""

from __future__ import annotations

from weakref import ref

import pytest
import torch
from builders.adapted_kinds import adapted, exact_delta, layers_of, reference
from builders.adapters import assert_same_tensors, perturb, snapshot
from builders.layer_kinds import KINDS, make_model, sample
from peft import PeftModel, get_peft_model

import sorsa_plugin.tuner.initialise
from sorsa_plugin import SORSAConfig, attach, export_lora, orthonormality
from sorsa_plugin.errors import DecompositionError, FoldError, RankError, SORSAConfigError
from sorsa_plugin.layers.layer import sorsa_layers
from sorsa_plugin.tools.inspect_adapter import inspect_adapter

ADDITIVE = [name for name, kind in KINDS.items() if not kind.lends]
LENDING = [name for name, kind in KINDS.items() if kind.lends]
DTYPES = (torch.float32, torch.bfloat16)

TOLERANCE = {"rtol": 1e-4, "atol": 2e-5}
"""fp32 against float64: outputs of order 1 after at most two layers of sums over fewer than 60 terms, each term with
a relative error of a few 2^-24 = 6e-8; 2e-5 leaves a factor of about five."""


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@torch.no_grad()
def test_a_new_or_disabled_adapter_gives_the_base_models_output_bit_for_bit(kind, dtype):
    x = sample(kind, dtype)
    expected = make_model(kind, dtype)(x)
    model = adapted(kind, dtype)
    assert torch.equal(model(x), expected)
    perturb(model)
    assert not torch.equal(model(x), expected)
    with model.disable_adapter():
        assert torch.equal(model(x), expected)


@pytest.mark.parametrize("first", [True, False], ids=["alone", "beside-another"])
@pytest.mark.parametrize("fails", ["the first layer", "its triplets"])
def test_where_an_adapter_cannot_be_made_every_module_has_its_place_back(kind, fails, first, monkeypatch):
    def fail(*args, **options):
        raise DecompositionError("no triplets")

    model = make_model(kind) if first else adapted(kind)
    before, tensors = dict(model.named_modules()), snapshot(model)
    options = SORSAConfig(r=2, svd_seed=1, **KINDS[kind].options)
    options.rank_pattern = {".*": 100} if fails == "the first layer" else {}
    monkeypatch.setattr(sorsa_plugin.tuner.initialise, "factorise", fail)
    with pytest.raises((DecompositionError, RankError)):
        get_peft_model(model, options) if first else model.add_adapter("second", options)
    assert dict(model.named_modules()) == before
    assert_same_tensors(snapshot(model), tensors)


@torch.no_grad()
def test_a_trained_adapter_computes_with_w_plus_its_change(kind):
    model, x = adapted(kind), sample(kind)
    perturb(model)
    expected = reference(kind, model, {layer: exact_delta(layer) for layer in layers_of(model)}, x)
    torch.testing.assert_close(model(x).double(), expected, **TOLERANCE)


def test_gradients_are_those_of_the_formula(kind):
    """Against autograd through the float64 reference."""
    model, x = adapted(kind), sample(kind)
    x = x if x.is_floating_point() or kind == "positions" else x.clamp(min=2)  # no padding: see the test below
    perturb(model)
    model(x).square().sum().backward()
    offsets = {
        layer: {
            name: getattr(layer.factors("default"), name).detach().double().requires_grad_()
            for name in ("dU", "dS", "dV")
        }
        for layer in layers_of(model)
    }
    deltas = {layer: exact_delta(layer, own) for layer, own in offsets.items()}
    reference(kind, model, deltas, x).square().sum().backward()
    for layer, own in offsets.items():
        for name, offset in own.items():
            gradient = getattr(layer.factors("default"), name).grad
            expected = offset.grad
            # sums over fewer than 200 output entries of order 1 in fp32
            torch.testing.assert_close(gradient.double(), expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@torch.no_grad()
def test_merging_keeps_the_output_and_unmerging_restores_the_weights_bit_for_bit(kind, dtype):
    model, x = adapted(kind, dtype), sample(kind, dtype)
    before = snapshot(model)
    perturb(model, scale=0.3)
    changed = snapshot(model)
    y = model(x)
    model.merge_adapter()
    assert snapshot(model).keys() == before.keys()
    # in bf16 the merged weight is rounded once more: relative 2^-8 of outputs of order 1, over two layers
    torch.testing.assert_close(model(x), y, **(TOLERANCE if dtype == torch.float32 else {"rtol": 0.05, "atol": 0.05}))
    model.unmerge_adapter()
    assert_same_tensors(snapshot(model), changed)
    assert torch.equal(model(x), y)


@torch.no_grad()
def test_unloading_gives_back_the_base_module_merged_or_not(kind):
    x, plain = sample(kind), make_model(kind)
    model = adapted(kind)
    perturb(model)
    y = model(x)
    merged = model.merge_and_unload()
    assert type(merged.inner) is type(plain.inner)
    assert list(snapshot(merged)) == list(snapshot(plain))
    torch.testing.assert_close(merged(x), y, **TOLERANCE)
    model = adapted(kind)
    perturb(model)
    assert_same_tensors(snapshot(model.unload()), snapshot(plain))


def test_a_layer_that_was_merged_and_unloaded_does_not_keep_the_weight_from_before(kind):
    """Else a model that is being merged holds all of them, because it works on a list of its layers."""
    model = adapted(kind)
    layers = layers_of(model)
    originals = [ref(layer.base_weight()) for layer in layers]
    model.merge_and_unload()
    assert [layer.merged for layer in layers] == [True] * len(layers)
    assert [original() for original in originals] == [None] * len(layers)


@torch.no_grad()
def test_saved_and_loaded_it_gives_the_same_output_bit_for_bit(kind, tmp_path):
    model, x = adapted(kind), sample(kind)
    perturb(model)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make_model(kind), tmp_path)
    assert torch.equal(loaded(x), model(x))


@torch.no_grad()
def test_a_second_adapter_adds_its_change_and_is_deleted_without_a_trace(kind):
    model, x = adapted(kind), sample(kind)
    perturb(model)
    alone = model(x)
    model.add_adapter("second", SORSAConfig(r=2, **KINDS[kind].options))
    perturb(model, "second", seed=9)
    model.base_model.set_adapter(["default", "second"])
    deltas = {
        layer: sum(layer.get_delta_weight(name).double() for name in ("default", "second"))
        for layer in layers_of(model)
    }
    torch.testing.assert_close(model(x).double(), reference(kind, model, deltas, x), **TOLERANCE)
    model.base_model.set_adapter("default")
    model.delete_adapter("second")
    assert torch.equal(model(x), alone)


def test_a_rank_given_for_a_module_beyond_its_weight_is_refused(kind):
    with pytest.raises(RankError, match="Lower r, or the module's entry in rank_pattern, to at most"):
        adapted(kind, rank_pattern={".*": 100})


@torch.no_grad()
def test_a_rank_for_all_modules_beyond_the_weight_is_the_weights_own_and_is_saved_and_loaded(kind, tmp_path):
    model, x = adapted(kind, r=100), sample(kind)
    for layer in sorsa_layers(model):
        assert layer.factors("default").rank == min(layer.out_features, layer.in_features)
    assert torch.equal(model(x), make_model(kind)(x))
    perturb(model)
    model.save_pretrained(tmp_path)
    assert torch.equal(PeftModel.from_pretrained(make_model(kind), tmp_path)(x), model(x))
    shown = inspect_adapter(tmp_path).layers
    assert [layer.rank for layer in shown] == [layer.factors("default").rank for layer in sorsa_layers(model)]
    if KINDS[kind].exported:
        export_lora(tmp_path, tmp_path / "lora")
        exported = PeftModel.from_pretrained(make_model(kind), tmp_path / "lora")
        torch.testing.assert_close(exported(x), model(x), rtol=1e-4, atol=1e-5)


def test_an_optimizer_step_trains_every_factor_and_applies_the_regularizer(kind):
    model, x = adapted(kind), sample(kind)
    perturb(model)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    attachment = attach(model, optimizer, gamma=0.01)
    before = orthonormality(model).item()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)  # the regularizer alone
    optimizer.step()
    assert attachment.steps == 1
    assert orthonormality(model).item() < before
    model.zero_grad()
    model(x).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters() if p.requires_grad)


def test_only_linear_layers_that_are_called_can_be_folded(kind):
    model = adapted(kind)
    if kind in ("linear", "transformers Conv1D"):
        model.fold()
        model.unfold()
        return
    with pytest.raises(FoldError, match="no folded form"):
        model.fold()
    for layer in layers_of(model):  # an attention's out_proj is linear, and only lends its weight
        with pytest.raises(FoldError, match="no folded form"):
            layer.fold()


# -- what only an added change can do ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ADDITIVE)
@torch.no_grad()
def test_mixed_batches_give_each_row_its_own_adapter(name):
    model, x = adapted(name), sample(name)
    perturb(model)
    adapted_rows = model(x)
    with model.disable_adapter():
        plain_rows = model(x)
    names = ["default" if row % 2 else "__base__" for row in range(len(x))]
    mixed = model(x, adapter_names=names)
    for row in range(len(x)):
        torch.testing.assert_close(mixed[row], (adapted_rows if row % 2 else plain_rows)[row], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", LENDING)
def test_mixed_batches_are_refused_where_a_weight_is_changed_for_the_whole_batch(name, refused):
    model, x = adapted(name), sample(name)
    with refused(ValueError, "does not support mixed adapter batches"):
        model(x, adapter_names=["default"] * len(x))


@pytest.mark.parametrize("name", ADDITIVE)
def test_dropout_drops_inputs_of_the_change_and_keeps_its_mean(name):
    """An embedding drops whole tokens: the inputs of its change are one-hot."""
    model, x = adapted(name, sorsa_dropout=0.5), sample(name)
    perturb(model)
    with torch.no_grad():
        full = model.eval()(x)
        with model.disable_adapter():
            base = model(x)
        model.train()
        torch.manual_seed(0)
        runs = torch.stack([model(x) for _ in range(200)]) - base
    if name == "embedding":
        changes = (full - base)[x != 1]
        kept = runs[:, x != 1] / changes
        assert ((kept - 2).abs() < 1e-2).logical_or(kept.abs() < 1e-2).all()  # 0 or 1/(1 - p), per token
    # standard error of a mean of 200 draws, of order |change| each: 7%; five of them. Unscaled it would be off by half
    assert (runs.mean(0) - (full - base)).norm() < 0.35 * (full - base).norm()


@pytest.mark.parametrize("name", LENDING)
def test_dropout_is_refused_where_the_change_has_no_input(name, refused):
    with refused(SORSAConfigError, r"sorsa_dropout is 0\.1"):
        adapted(name, sorsa_dropout=0.1)
