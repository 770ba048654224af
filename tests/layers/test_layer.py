"""The SORSA layer: the paper's formula and gradients, alone and beside other adapters."""

from __future__ import annotations

import contextlib

import pytest
import torch
from builders.adapters import perturb
from builders.llama import tiny_llama
from builders.one_layer import KINDS, SHAPES, adapt, inputs, make_base, only_layer
from builders.references import ROUNDOFF, forward_bound, paper_forward
from peft import PeftConfig, get_peft_model
from torch import nn

from sorsa_plugin import SORSAConfig
from sorsa_plugin.files.adapter_format import OFFSETS

DTYPES = [torch.float32, torch.bfloat16]

ALL_LAYERS = [
    pytest.param(kind, shape, rank, id=f"{kind}-{name}-rank{rank}")
    for kind in KINDS
    for name, shape in SHAPES.items()
    for rank in (1, 4, min(shape))
]


def autocast(enabled: bool):
    return torch.autocast("cpu", dtype=torch.bfloat16) if enabled else contextlib.nullcontext()


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


# -- copies ----------------------------------------------------------------------------------------------------------


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
