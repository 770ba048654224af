"""A new or disabled adapter gives the base model's output, bit for bit."""

from __future__ import annotations

import contextlib

import pytest
import torch
from builders.adapters import assert_same_tensors, perturb, snapshot
from builders.llama import tiny_llama
from builders.one_layer import KINDS, SHAPES, OneLayer, adapt, inputs, make_base, only_layer
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import get_peft_model
from torch import nn

from sorsa_plugin import SORSAConfig

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


# -- options ---------------------------------------------------------------------------------------------------------


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
