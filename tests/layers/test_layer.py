"""The SORSA layer: bit-equal to the base at init and when disabled, the paper's formula and gradients otherwise."""

from __future__ import annotations

import contextlib
import copy
import io
import warnings

import pytest
import torch
from builders.llama import tiny_llama
from builders.one_layer import (
    KINDS,
    ROUNDOFF,
    SHAPES,
    OneLayer,
    adapt,
    assert_same_tensors,
    forward_bound,
    inputs,
    make_base,
    only_layer,
    paper_forward,
    perturb,
    snapshot,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftConfig, PeftModel, get_peft_model
from torch import nn
from transformers import MambaConfig, MambaForCausalLM
from transformers.pytorch_utils import Conv1D

from sorsa_plugin import SORSAConfig, export_lora, factorise
from sorsa_plugin.errors import RankError, UnsupportedLayerError
from sorsa_plugin.layers.factors import OFFSETS
from sorsa_plugin.regularizer.trained_factors import sorsa_layers

DTYPES = [torch.float32, torch.bfloat16]
ALL_LAYERS = [
    pytest.param(kind, shape, rank, id=f"{kind}-{name}-rank{rank}")
    for kind in KINDS
    for name, shape in SHAPES.items()
    for rank in (1, 4, min(shape))
]


def autocast(enabled: bool):
    return torch.autocast("cpu", dtype=torch.bfloat16) if enabled else contextlib.nullcontext()


# -- the base model is never harmed ----------------------------------------------------------------------------------


@pytest.mark.parametrize("under_autocast", [False, True], ids=["plain", "autocast"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("kind", "shape", "rank"), ALL_LAYERS)
def test_a_new_adapter_gives_the_base_models_output_bit_for_bit(kind, shape, rank, dtype, under_autocast):
    base, x = make_base(kind, shape, dtype), inputs(shape[1], dtype=dtype)
    with autocast(under_autocast), torch.no_grad():
        expected = base(x)
        found = adapt(base, r=rank)(x)
    assert found.dtype == expected.dtype
    assert torch.equal(found, expected)


@pytest.mark.parametrize("under_autocast", [False, True], ids=["plain", "autocast"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_a_disabled_adapter_gives_the_base_models_output_bit_for_bit(kind, dtype, under_autocast):
    base, x = make_base(kind, (40, 16), dtype), inputs(16, dtype=dtype)
    with autocast(under_autocast), torch.no_grad():
        expected = base(x)
        model = adapt(base)
        perturb(model)
        assert not torch.equal(model(x), expected)
        with model.disable_adapter():
            assert torch.equal(model(x), expected)
        assert not torch.equal(model(x), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_whole_language_model_is_bit_equal_at_init_and_disabled(dtype, tokens):
    base = tiny_llama(dtype)
    before = snapshot(base)
    expected = base(tokens).logits
    model = get_peft_model(base, SORSAConfig(r=4, target_modules="all-linear"))
    assert torch.equal(model(tokens).logits, expected)
    perturb(model)
    with model.disable_adapter():
        assert torch.equal(model(tokens).logits, expected)
    assert_same_tensors(snapshot(model.unload()), before)


@settings(max_examples=25, deadline=None)
@given(
    out=st.integers(1, 20),
    inner=st.integers(1, 20),
    share=st.floats(0, 1),
    dtype=st.sampled_from(DTYPES),
    size=st.sampled_from([1e-3, 1.0, 1e3]),
    seed=st.integers(0, 999),
)
def test_any_new_adapter_leaves_any_output_bit_equal(out, inner, share, dtype, size, seed):
    base, x = make_base("linear", (out, inner), dtype, seed), inputs(inner, dtype=dtype, seed=seed) * size
    expected = base(x)
    assert torch.equal(adapt(base, r=max(1, int(share * min(out, inner))))(x), expected)


# -- the paper's formula ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("kind", "shape", "rank"), ALL_LAYERS)
def test_the_output_is_the_papers_formula_in_float64(kind, shape, rank, dtype):
    model, x = adapt(make_base(kind, shape, dtype), r=rank), inputs(shape[1], dtype=dtype)
    perturb(model)
    layer = only_layer(model)
    error = (model(x).detach().double() - paper_forward(layer, x)).abs()
    assert (error <= forward_bound(layer, x)).all()


def test_a_small_change_survives_bf16():
    # the reason for the offset form: a change of 1e-3, computed as two bf16 products, is lost in their cancellation
    base, x = make_base("linear", (24, 24), torch.bfloat16), inputs(24, dtype=torch.bfloat16)
    model = adapt(base)
    perturb(model, scale=1e-3)
    layer = only_layer(model)
    L, R = (part.detach() for part in layer.factors("default").low_rank_pair())
    exact = x.double() @ R.double() @ L.double().T
    zero = nn.Linear(24, 24, dtype=torch.bfloat16)
    with torch.no_grad():
        zero.weight.zero_(), zero.bias.zero_()
    layer.base_layer = zero
    layer.factors("default").base_checked = True
    # four roundings (R, x R, L, the change) of 2^-8 at most each, in the norm of independent errors
    assert (model(x).double() - exact).norm() <= 4 * ROUNDOFF[torch.bfloat16] * exact.norm()


@pytest.mark.parametrize("leading", [(), (3,), (2, 3)], ids=str)
def test_inputs_of_any_number_of_dimensions_are_accepted(leading):
    model = adapt(make_base(shape=(40, 16)))
    perturb(model)
    x = torch.randn(*leading, 16)
    y = model(x)
    assert y.shape == (*leading, 40)
    layer = only_layer(model)
    flat = x.reshape(-1, 16)
    assert ((y.reshape(-1, 40).double() - paper_forward(layer, flat)).abs() <= forward_bound(layer, flat)).all()


@pytest.mark.parametrize(("kind", "shape", "rank"), ALL_LAYERS)
def test_the_gradients_are_those_of_the_papers_formula_in_float64(kind, shape, rank):
    model, x = adapt(make_base(kind, shape), r=rank), inputs(shape[1]).requires_grad_()
    perturb(model)
    layer = only_layer(model)
    factors = layer.factors("default")
    g = torch.randn(5, shape[0], generator=torch.Generator().manual_seed(5))
    (model(x) * g).sum().backward()

    names = ("U0", "S0", "V0")
    initial = [getattr(factors, name).detach().double() for name in names]
    current = [part.detach().double().requires_grad_() for part in layer.get_factors()]
    x64 = x.detach().double().requires_grad_()
    (U0, S0, V0), (U, S, V) = initial, current
    residual = layer.base_matrix().detach().double() - (U0 * S0) @ V0.T
    ((x64 @ residual.T + ((x64 @ V) * S) @ U.T) * g.double()).sum().backward()

    # three chained products of n terms each, independent errors: sqrt(n) u apiece; 10 for the constant and for sums
    # whose terms cancel
    tolerance = 10 * 3 * (shape[0] + shape[1] + 5) ** 0.5 * ROUNDOFF[torch.float32]
    found = [x.grad, factors.dU.grad, factors.dS.grad, factors.dV.grad]
    for ours, reference in zip(found, (x64.grad, U.grad, S.grad, V.grad), strict=True):
        assert ours.dtype == torch.float32
        assert (ours.double() - reference).norm() <= tolerance * reference.norm()
    assert layer.get_base_layer().weight.grad is None


@pytest.mark.parametrize("fold", [False, True], ids=["intact", "folded"])
@pytest.mark.parametrize("kind", KINDS)
def test_torch_func_gives_the_gradients_of_single_samples(kind, fold):
    model, x = adapt(make_base(kind)), inputs(24)
    perturb(model)
    if fold:
        model.base_model.fold()
    offsets = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}

    def loss(offsets, row):
        return torch.func.functional_call(model, offsets, (row[None],)).square().sum()

    detached = {name: offset.detach() for name, offset in offsets.items()}
    found = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(detached, x)
    for i, row in enumerate(x):
        expected = torch.autograd.grad(model(row[None]).square().sum(), list(offsets.values()))
        for name, gradient in zip(offsets, expected, strict=True):
            torch.testing.assert_close(found[name][i], gradient, rtol=1e-4, atol=1e-5)


def test_gradients_at_init_are_not_zero_for_any_factor():
    model = adapt(make_base())
    model(inputs(24)).square().sum().backward()
    for name in OFFSETS:
        assert only_layer(model).factors("default").get_parameter(name).grad.norm() > 0


def test_under_autocast_the_offsets_get_fp32_gradients_close_to_the_exact_ones():
    gradients = []
    for enabled in (False, True):
        model, x = adapt(make_base(shape=(40, 16))), inputs(16)
        perturb(model)
        with autocast(enabled):
            model(x).float().sum().backward()
        gradients.append([only_layer(model).factors("default").get_parameter(name).grad for name in OFFSETS])
    for exact, rounded in zip(*gradients, strict=True):
        assert rounded.dtype == torch.float32
        # x, R, L, x R, the upstream gradient and the products: eight 16-bit roundings at most on a path
        assert (rounded - exact).norm() <= 8 * ROUNDOFF[torch.bfloat16] * exact.norm()


def test_gradient_checkpointing_gives_the_same_gradients(tokens):
    gradients = []
    for checkpointing in (False, True):
        base = tiny_llama()
        if checkpointing:
            base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model = get_peft_model(base, SORSAConfig(r=4, target_modules="all-linear")).train()
        perturb(model)
        model(tokens, labels=tokens).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    assert gradients[0].keys() == gradients[1].keys()
    assert len(gradients[0]) == 3 * 14
    for name, gradient in gradients[0].items():
        assert torch.equal(gradient, gradients[1][name]), name


# -- several adapters ------------------------------------------------------------------------------------------------


def two_adapters(**second) -> tuple[nn.Module, nn.Module]:
    """A layer with adapters "default" of rank 4 and "second" (rank 2 unless told), both exact."""
    model = adapt(make_base(shape=(40, 16)), r=4, svd="exact")
    model.add_adapter("second", SORSAConfig(**{"r": 2, "target_modules": ["proj"], "svd": "exact", **second}))
    return model, only_layer(model)


def test_two_active_adapters_add_up_their_changes():
    model, layer = two_adapters()
    perturb(model, seed=1)
    perturb(model, "second", seed=2)
    x = inputs(16)
    layer.set_adapter(["default", "second"])
    base = layer.base_layer(x).detach().double()
    expected = base + sum(paper_forward(layer, x, name) - base for name in ("default", "second"))
    # each paper_forward holds the base output in float64, the fp32 one differs from it within the same bound
    error = (model(x).detach().double() - expected).abs()
    assert (error <= 2 * forward_bound(layer, x, ("default", "second"))).all()


def test_only_the_active_adapter_counts():
    model, layer = two_adapters()
    perturb(model, seed=1)
    perturb(model, "second", seed=2)
    x = inputs(16)
    outputs = {}
    for name in ("default", "second"):
        model.set_adapter(name)
        assert list(layer.trained()) == [name]
        outputs[name] = model(x).detach()
        assert (
            (outputs[name].double() - paper_forward(layer, x, name)).abs() <= forward_bound(layer, x, (name,))
        ).all()
    assert not torch.equal(outputs["default"], outputs["second"])


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


def test_deleting_an_adapter_leaves_nothing_of_it():
    model, layer = two_adapters(sorsa_dropout=0.5)
    perturb(model, seed=1)
    x = inputs(16)
    expected = model(x)
    model.delete_adapter("second")
    assert not [key for key in model.state_dict() if "second" in key]
    assert not [name for name, _ in model.named_modules() if "second" in name]
    assert "second" not in layer.configs
    assert "second" not in model.peft_config
    assert torch.equal(model(x), expected)
    with pytest.raises(ValueError, match="no SORSA adapter named 'second'"):
        layer.get_factors("second")


def test_deleting_the_only_adapter_gives_the_base_model_back():
    base, x = make_base(), inputs(24)
    expected = base(x)
    model = adapt(base)
    perturb(model)
    model.delete_adapter("default")
    assert torch.equal(model.base_model.model(x), expected)  # PeftModel.forward itself wants an active adapter
    assert not [key for key in model.state_dict() if "sorsa" in key]


# -- options ---------------------------------------------------------------------------------------------------------


def test_dropout_acts_on_the_change_only_and_only_in_training():
    base, x = make_base(shape=(40, 16)), inputs(16)
    expected = base(x)
    model = adapt(base, sorsa_dropout=0.5).train()
    assert torch.equal(model(x), expected)  # the base path is not dropped, and the change is zero
    perturb(model)
    layer = only_layer(model)
    exact = adapt(make_base(shape=(40, 16)))
    perturb(exact)

    torch.manual_seed(4)
    dropped = model(x).detach()
    torch.manual_seed(4)
    mask = nn.functional.dropout(torch.ones_like(x), 0.5)
    assert 0 < int((mask == 0).sum()) < mask.numel()
    L, R = (part.detach().double() for part in layer.factors("default").low_rank_pair())
    reference = expected.double() + (x * mask).double() @ R @ L.T
    assert ((dropped.double() - reference).abs() <= 2 * forward_bound(layer, 2 * x)).all()

    model.eval()
    assert torch.equal(model(x), exact(x))


def test_an_adapter_added_to_a_model_in_eval_mode_does_not_drop():
    model = adapt(make_base()).eval()
    model.add_adapter("second", SORSAConfig(r=2, target_modules=["proj"], sorsa_dropout=0.9))
    assert not only_layer(model).sorsa_dropout["second"].training


def test_random_weights_change_the_output_and_two_adapters_differ():
    base, x = make_base(), inputs(24)
    expected = base(x)
    model = adapt(base, init_weights=False)
    model.add_adapter("second", SORSAConfig(r=4, target_modules=["proj"], init_weights=False))
    layer = only_layer(model)
    assert not torch.allclose(model(x), expected)
    assert not torch.equal(layer.factors("default").dU, layer.factors("second").dU)
    assert ((model(x).detach().double() - paper_forward(layer, x)).abs() <= forward_bound(layer, x)).all()


@pytest.mark.parametrize(("kind", "declared"), [("conv1d", False), ("linear", True)])
def test_a_wrong_fan_in_fan_out_is_corrected_with_a_warning(kind, declared):
    base, x = make_base(kind, (40, 16)), inputs(16)
    expected = base(x)
    config = SORSAConfig(r=4, target_modules=["proj"], fan_in_fan_out=declared)
    with pytest.warns(UserWarning, match=f"fan_in_fan_out is set to {declared} .*Setting fan_in_fan_out to"):
        model = get_peft_model(base, config)
    assert model.peft_config["default"].fan_in_fan_out is not declared
    assert torch.equal(model(x), expected)
    layer = only_layer(model)
    assert (layer.out_features, layer.in_features) == (40, 16)


@pytest.mark.parametrize("kind", KINDS)
def test_a_right_fan_in_fan_out_does_not_warn(kind):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        adapt(make_base(kind))


@pytest.mark.parametrize(
    "module", [nn.ConvTranspose2d(3, 4, 3), nn.EmbeddingBag(8, 4), nn.LayerNorm(4)], ids=lambda m: type(m).__name__
)
def test_an_unsupported_module_is_an_error_that_names_it_its_type_and_the_way_out(module):
    message = rf"Target module proj of type {type(module).__name__} is not supported .*exclude_modules"
    with pytest.raises(UnsupportedLayerError, match=message) as caught:
        adapt(OneLayer(module))
    assert isinstance(caught.value, TypeError)


def test_subclasses_of_the_known_kinds_are_adapted():
    class Mine(nn.Linear):
        pass

    class MineToo(Conv1D):
        pass

    for module, kind in ((Mine(6, 8), "SORSALinear"), (MineToo(8, 6), "SORSAConv1DLinear")):
        layer = only_layer(adapt(OneLayer(module), r=2))
        assert type(layer).__name__ == kind
        assert (layer.out_features, layer.in_features) == (8, 6)


def adapted_names(**options) -> set[str]:
    return {layer.name for layer in sorsa_layers(get_peft_model(tiny_llama(), SORSAConfig(r=2, **options)))}


@pytest.mark.parametrize("mode", ["grad", "no-grad", "folded", "mixed"])
@pytest.mark.parametrize("leading", [(5,), (2, 5)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_a_hook_on_the_base_keeps_the_bases_output(kind, leading, mode):
    base, seen = make_base(kind), []
    base.proj.register_forward_hook(lambda module, args, output: seen.append(output))
    x = torch.randn(*leading, 24, generator=torch.Generator().manual_seed(0))
    expected = base(x).detach().clone()
    model = adapt(base).eval()
    perturb(model)
    if mode == "folded":
        model.base_model.fold()
        expected = only_layer(model).get_base_layer()(x).detach().clone()
    with torch.set_grad_enabled(mode != "no-grad"):
        output = model(x, adapter_names=["default"] * len(x)) if mode == "mixed" else model(x)
    assert torch.equal(seen[-1], expected)
    assert not torch.equal(output, expected)


class Tanh(nn.Linear):
    """Keeps its output for its backward."""

    def forward(self, x):
        return super().forward(x).tanh()


class Skipped(nn.Linear):
    """Gives its input."""

    def forward(self, x):
        return x


@pytest.mark.parametrize("base", [Tanh, Skipped])
def test_a_forward_of_the_modules_own_keeps_what_it_gave(base):
    model, x = adapt(OneLayer(base(24, 24))), inputs(24)
    perturb(model)
    before = x.clone()
    change = x.double() @ only_layer(model).get_delta_weight("default").detach().double().T
    expected = only_layer(model).get_base_layer()(x).double() + change
    torch.testing.assert_close(model(x).double(), expected, rtol=1e-5, atol=1e-5)
    x.requires_grad_()
    model(x).sum().backward()
    assert x.grad.isfinite().all()
    assert torch.equal(x, before)


def test_all_linear_is_every_projection_but_the_head():
    names = adapted_names(target_modules="all-linear")
    kinds = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    assert {name.split(".")[-1] for name in names} == set(kinds)
    assert len(names) == 14


def test_the_default_targets_are_pefts_for_the_architecture():
    assert {name.split(".")[-1] for name in adapted_names()} == {"q_proj", "v_proj"}


def test_excluded_modules_are_left_alone():
    names = adapted_names(target_modules="all-linear", exclude_modules=["q_proj", "layers.1.mlp.up_proj"])
    assert len(names) == 14 - 3
    assert not [name for name in names if name.endswith("q_proj")]


def test_layers_to_transform_selects_layers():
    assert adapted_names(target_modules=["q_proj"], layers_to_transform=[1]) == {"model.layers.1.self_attn.q_proj"}


def test_targets_that_match_nothing_are_an_error():
    with pytest.raises(ValueError, match="nothing_like_this"):
        adapted_names(target_modules=["nothing_like_this"])


def test_modules_to_save_train_in_full_beside_the_adapter(tokens, tmp_path):
    model = get_peft_model(tiny_llama(), SORSAConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"]))
    model(tokens, labels=tokens).loss.backward()
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == 3 * 2 + 1
    head = next(name for name in trained if "lm_head" in name)
    assert model.get_parameter(head).grad.norm() > 0


def test_exactly_the_offsets_train():
    model = get_peft_model(tiny_llama(), SORSAConfig(r=2, target_modules="all-linear"))
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == 14 * 3
    assert {name.rsplit(".", 1)[1] for name in trained} == set(OFFSETS)
    assert all(".sorsa_factors.default." in name for name in trained)  # what TRL replaces to copy an adapter
    count = sum(2 * (layer.out_features + layer.in_features) + 2 for layer in sorsa_layers(model))
    assert model.get_nb_trainable_parameters()[0] == count


# -- copies ----------------------------------------------------------------------------------------------------------


def through_torch_save(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, through_torch_save], ids=["deepcopy", "torch.save"])
def test_a_copied_model_computes_the_same_and_is_independent(duplicate, llama, tokens):
    model = get_peft_model(llama, SORSAConfig(r=3, target_modules="all-linear"))
    perturb(model)
    expected = model(tokens).logits
    twin = duplicate(model)
    assert torch.equal(twin(tokens).logits, expected)
    assert_same_tensors(twin.state_dict(), model.state_dict())
    perturb(twin, seed=9)
    assert torch.equal(model(tokens).logits, expected)
    assert not torch.equal(twin(tokens).logits, expected)
    twin(tokens, labels=tokens).loss.backward()
    assert all(p.grad is not None for p in twin.parameters() if p.requires_grad)
    assert all(p.grad is None for p in model.parameters())


def test_a_copied_model_is_regularized_when_its_own_optimizer_steps(tokens):
    model = copy.deepcopy(get_peft_model(tiny_llama(), SORSAConfig(r=3, target_modules=["q_proj"], gamma=0.5)))
    perturb(model)
    factors = sorsa_layers(model)[0].factors("default")
    before = factors.dU.detach().clone()
    model(tokens, labels=tokens).loss.backward()
    task_gradient = factors.dU.grad.clone()
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3).step()
    assert not torch.equal(factors.dU.detach(), before - 1e-3 * task_gradient)


def test_the_repr_says_sorsa_and_shows_the_base_layer():
    text = repr(only_layer(adapt(make_base())))
    assert text.startswith("sorsa.SORSALinear(")
    assert "(base_layer): Linear(in_features=24, out_features=24, bias=True)" in text


def test_a_config_from_another_directory_does_not_leak_into_the_layer(tmp_path):
    SORSAConfig(r=2, target_modules=["proj"]).save_pretrained(tmp_path)
    config = PeftConfig.from_pretrained(tmp_path)
    config.factors_from_file = False
    base, x = make_base(), inputs(24)
    expected = base(x)
    assert torch.equal(get_peft_model(base, config)(x), expected)


def test_modules_that_mambas_kernels_read_are_refused_as_for_lora():
    model = MambaForCausalLM(MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=1, state_size=4))
    with pytest.raises(ValueError, match="Module 'out_proj' is incompatible with Mamba-based models"):
        get_peft_model(model, SORSAConfig(r=2, target_modules=["out_proj"]))
    get_peft_model(model, SORSAConfig(r=2, target_modules=["in_proj"]))


@pytest.mark.parametrize(
    "computed",
    [nn.utils.parametrizations.weight_norm, nn.utils.parametrizations.spectral_norm, nn.utils.spectral_norm],
)
def test_a_weight_computed_from_others_is_refused_with_a_way_out(computed):
    base = nn.Sequential(computed(nn.Linear(6, 5)))
    with pytest.raises(UnsupportedLayerError, match="computed from other parameters") as error:
        get_peft_model(base, SORSAConfig(r=2, target_modules=["0"]))
    assert "remove_parametrizations" in str(error.value)


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
