"""The low-rank step by itself: gradients in float64, any input layout, what is kept for backward, pairs held while
decoding."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from builders.adapters import perturb
from builders.llama import tiny_llama
from builders.one_layer import adapt, inputs, make_base, only_layer
from builders.references import ROUNDOFF, paper_forward
from peft import get_peft_model
from torch import nn

from sorsa_plugin import SORSAConfig, holding_pairs
from sorsa_plugin.linalg.offset_form import FEW_COLUMNS, FEWEST_COLUMNS, Parts, add_low_rank
from sorsa_plugin.linalg.residual_form import add_triplets

OUT, IN, RANK = 7, 5, 3


def parts_of(out: int = OUT, inner: int = IN, rank: int = RANK, dtype: torch.dtype = torch.float64) -> Parts:
    """Random tensors of every part; the offsets require grad."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(out, rank), (rank,), (inner, rank)] * 2
    tensors = [torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes]
    return Parts(*(tensor.requires_grad_(i < 3) for i, tensor in enumerate(tensors)))


def autograd_reference(y: torch.Tensor, x: torch.Tensor, parts: Parts) -> torch.Tensor:
    """y + x (U S V^T - U0 S0 V0^T)^T by plain autograd."""
    U, S, V = parts.U0 + parts.dU, parts.S0 + parts.dS, parts.V0 + parts.dV
    return y + x @ ((U * S) @ V.mT - (parts.U0 * parts.S0) @ parts.V0.mT).mT


def gradients(function: Any, x: torch.Tensor, parts: Parts, g: torch.Tensor) -> list[torch.Tensor]:
    leaves = [x, *parts[:3]]
    y = torch.zeros(*x.shape[:-1], parts.dU.shape[0], dtype=x.dtype)
    return list(torch.autograd.grad(function(y, x, parts), [leaf for leaf in leaves if leaf.requires_grad], g))


@pytest.mark.parametrize("leading", [(4,), (2, 3), ()], ids=str)
def test_gradients_agree_with_finite_differences_in_float64(leading: tuple[int, ...]) -> None:
    parts = parts_of()
    x = torch.randn(*leading, IN, dtype=torch.float64, requires_grad=True)
    y = torch.randn(*leading, OUT, dtype=torch.float64, requires_grad=True)

    def function(y: torch.Tensor, x: torch.Tensor, *offsets: torch.Tensor) -> torch.Tensor:
        return add_low_rank(y * 1.0, x, Parts(*offsets, *parts[3:]))

    assert torch.autograd.gradcheck(function, (y, x, *parts[:3]))


@pytest.mark.parametrize("rank", [1, FEWEST_COLUMNS // 2, FEWEST_COLUMNS // 2 + 1, FEW_COLUMNS - 1, FEW_COLUMNS, 40])
@pytest.mark.parametrize("needs_x", [True, False])
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "expanded", "sliced"])
def test_gradients_are_those_of_plain_autograd_whatever_the_layout(layout: str, needs_x: bool, rank: int) -> None:
    parts = parts_of(48, 44, rank)
    x, g = torch.randn(2, 6, 44, dtype=torch.float64), torch.randn(2, 6, 48, dtype=torch.float64)
    if layout == "transposed":
        x, g = (t.transpose(0, 1).contiguous().transpose(0, 1) for t in (x, g))
    elif layout == "expanded":
        x, g = x[:1].expand(2, 6, 44), g[:, :1].expand(2, 6, 48)
    elif layout == "sliced":
        x, g = torch.cat((x, x), dim=-1)[..., :44], torch.cat((g, g), dim=-1)[..., :48]
    x = x.requires_grad_(needs_x)
    expected = gradients(autograd_reference, x, parts, g)
    found = gradients(add_low_rank, x, parts, g)
    assert len(found) == 3 + needs_x
    for ours, reference in zip(found, expected, strict=True):
        # float64, sums of at most 48 terms of size up to about 50 in a chain of three products
        torch.testing.assert_close(ours, reference, rtol=0, atol=1e-10)


@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
def test_the_base_output_may_have_any_layout(layout: str) -> None:
    parts, x, y = parts_of(), torch.randn(2, 4, IN, dtype=torch.float64), torch.randn(2, 4, OUT, dtype=torch.float64)
    expected = autograd_reference(y, x, parts)
    y = y.transpose(0, 1).contiguous().transpose(0, 1) if layout == "transposed" else y
    for enabled in (True, False):
        with torch.set_grad_enabled(enabled):
            torch.testing.assert_close(add_low_rank(y.clone(), x, parts), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("rank", [2, FEWEST_COLUMNS + 1])
@pytest.mark.parametrize("leading", [(0,), (2, 0)], ids=str)
@pytest.mark.parametrize("function", [add_low_rank, add_triplets])
def test_no_tokens_give_no_output_and_gradients_of_zero(function: Any, leading: tuple[int, ...], rank: int) -> None:
    """As experts get that no token was sent to."""
    parts, x = parts_of(48, 44, rank), torch.randn(*leading, 44, dtype=torch.float64, requires_grad=True)
    y = function(torch.zeros(*leading, 48, dtype=torch.float64), x, parts)
    assert y.shape == (*leading, 48)
    y.sum().backward()
    assert x.grad is not None
    assert x.grad.shape == x.shape
    assert all(part.grad is not None and not part.grad.any() for part in parts[:3])
    with torch.no_grad():
        assert function(torch.zeros(*leading, 48, dtype=torch.float64), x, parts).shape == (*leading, 48)


def test_only_what_needs_a_gradient_gets_one() -> None:
    parts = parts_of()
    frozen = Parts(*(part.detach() for part in parts))
    x = torch.randn(4, IN, dtype=torch.float64, requires_grad=True)
    g = torch.randn(4, OUT, dtype=torch.float64)
    expected = gradients(autograd_reference, x, parts, g)[0]
    (found,) = torch.autograd.grad(add_low_rank(torch.zeros(4, OUT, dtype=torch.float64), x, frozen), [x], g)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_a_layer_used_twice_in_one_forward_gets_both_gradients() -> None:
    model = adapt(make_base()).double()
    perturb(model)
    layer, x = only_layer(model), inputs(24, dtype=torch.float64)
    layer(layer(x)).square().sum().backward()

    reference = adapt(make_base()).double()
    perturb(reference)
    other = only_layer(reference)
    residual = other.base_matrix() - (other.factors("default").U0 * other.factors("default").S0) @ (
        other.factors("default").V0.mT
    )
    y = x
    for _ in range(2):
        U, S, V = other.get_factors()
        y = y @ residual.mT + ((y @ V) * S) @ U.mT + other.get_base_layer().bias
    y.square().sum().backward()
    for name in ("dU", "dS", "dV"):
        found, expected = (own.factors("default").get_parameter(name).grad for own in (layer, other))
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("needs_x", [False, True])
@pytest.mark.parametrize("add", [add_low_rank, add_triplets])
def test_second_derivatives_agree_with_finite_differences_in_float64(add: Any, needs_x: bool, weighted: bool) -> None:
    parts, W = parts_of(), torch.randn(OUT, IN, dtype=torch.float64)
    x = torch.randn(4, IN, dtype=torch.float64, requires_grad=needs_x)

    def function(x: torch.Tensor, *offsets: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            y = x @ W.mT
        return add(y if weighted else x @ W.mT, x, Parts(*offsets, *parts[3:]), W if weighted else None)

    assert torch.autograd.gradgradcheck(function, (x, *parts[:3]))


@pytest.mark.parametrize("add", [add_low_rank, add_triplets])
def test_gradients_with_and_without_a_graph_are_the_same(add: Any) -> None:
    parts, x = parts_of(), torch.randn(2, 3, IN, dtype=torch.float64, requires_grad=True)
    y = add(torch.zeros(2, 3, OUT, dtype=torch.float64), x, parts)
    found = torch.autograd.grad(y.square().sum(), [x, *parts[:3]], retain_graph=True)
    graphed = torch.autograd.grad(y.square().sum(), [x, *parts[:3]], create_graph=True)
    for plain, other in zip(found, graphed, strict=True):
        assert other.requires_grad
        assert not plain.requires_grad
        # float64, sums of at most 7 terms of size up to about 50 in a chain of three products
        torch.testing.assert_close(other, plain, rtol=0, atol=1e-11)


def test_x_and_x_times_v_are_all_that_is_kept() -> None:
    parts, kept = parts_of(dtype=torch.float32), []
    x = torch.randn(64, IN, requires_grad=True)
    own = {part.untyped_storage().data_ptr() for part in (*parts, x)}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            kept.append(tensor.untyped_storage().nbytes())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        add_low_rank(torch.zeros(64, OUT), x, parts)
    assert kept == [64 * RANK * 4]


# -- pairs held while decoding ---------------------------------------------------------------------------------------


@pytest.fixture
def formed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for every time that a pair is formed."""
    calls: list[int] = []
    pair = Parts.pair

    def counting(self: Parts) -> Any:
        calls.append(1)
        return pair(self)

    monkeypatch.setattr(Parts, "pair", counting)
    return calls


@torch.no_grad()
def test_a_held_pair_is_formed_once_and_gives_the_same_output(formed: list[int]) -> None:
    model, x = adapt(make_base()), inputs(24)
    perturb(model)
    expected = model(x)
    formed.clear()
    with holding_pairs():
        assert all(torch.equal(model(x), expected) for _ in range(3))
        assert len(formed) == 1
    assert torch.equal(model(x), expected)
    assert len(formed) == 2, "nothing is held outside the context"


def optimizer_step(model: nn.Module) -> None:
    model.train()
    with torch.enable_grad():
        model(inputs(24)).square().sum().backward()
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1).step()
    model.eval()


def replaced_data(model: nn.Module) -> None:
    for name in ("dU", "dS", "dV"):
        offset = only_layer(model).factors("default").get_parameter(name)
        offset.data = offset.data + 0.1


CHANGES = {
    "written in place": lambda model: only_layer(model).factors("default").dS.add_(0.1),
    "an optimizer step": optimizer_step,
    "other factors": lambda model: only_layer(model).set_factors(
        "default", *(part * 1.1 for part in only_layer(model).get_factors())
    ),
    "data replaced": replaced_data,
    "a state dict loaded": lambda model: model.load_state_dict(
        {key: value * 1.1 if "dS" in key else value for key, value in model.state_dict().items()}
    ),
    "factorised anew": lambda model: only_layer(model).factors("default").S0.mul_(1.1),
    "another dtype": lambda model: model.double(),
    "another adapter": lambda model: model.set_adapter("second"),
    "merged": lambda model: model.merge_adapter(),
    "disabled": lambda model: model.base_model.disable_adapter_layers(),
}


@pytest.mark.parametrize("name", CHANGES)
@torch.no_grad()
def test_a_held_pair_never_outlives_a_change(name: str) -> None:
    model = adapt(make_base()).eval()
    model.add_adapter("second", SORSAConfig(r=2, target_modules=["proj"]))
    perturb(model)
    perturb(model, "second", seed=5)
    with holding_pairs():
        before = model(inputs(24))
        CHANGES[name](model)
        x = inputs(24).to(only_layer(model).base_matrix().dtype)
        held = model(x)
    assert torch.equal(held, model(x))
    if name not in ("another dtype", "merged"):
        assert not torch.allclose(held, before, atol=1e-4)


def test_a_held_pair_takes_no_part_in_training() -> None:
    model = adapt(make_base())
    perturb(model)
    with holding_pairs():
        with torch.no_grad():
            model(inputs(24))
        model(inputs(24)).sum().backward()
    assert only_layer(model).factors("default").dU.grad is not None


@torch.no_grad()
def test_autocast_and_plain_forwards_do_not_share_a_held_pair() -> None:
    model, x = adapt(make_base()), inputs(24)
    perturb(model)
    with holding_pairs():
        with torch.autocast("cpu", dtype=torch.bfloat16):
            rounded = model(x)
        plain = model(x)
    assert (rounded.dtype, plain.dtype) == (torch.bfloat16, torch.float32)
    error = (plain.double() - paper_forward(only_layer(model), x)).abs().max()
    assert error < 100 * ROUNDOFF[torch.float32], "a pair in bf16 would err by 1e-2"


def test_generate_forms_each_pair_once(formed: list[int], tokens: torch.Tensor) -> None:
    model = get_peft_model(tiny_llama(), SORSAConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    perturb(model, scale=0.5)
    greedy = {"max_new_tokens": 5, "do_sample": False}
    expected = tokens
    with torch.no_grad():
        for _ in range(5):
            following = model(expected).logits[:, -1].argmax(-1, keepdim=True)
            expected = torch.cat((expected, following), dim=1)
    formed.clear()
    assert torch.equal(model.generate(input_ids=tokens, **greedy), expected)
    assert len(formed) == 14
    perturb(model, seed=9, scale=0.5)
    changed = model.generate(input_ids=tokens, **greedy)
    assert len(formed) == 28
    assert not torch.equal(changed, expected)
