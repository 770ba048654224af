"""Folded layers: the paper's stored form gives what the intact form gives, and everything but the step is as before."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from builders.adapters import assert_same_tensors, perturb, snapshot
from builders.llama import tiny_llama
from builders.one_layer import KINDS, SHAPES, adapt, inputs, make_base, only_layer
from builders.references import ROUNDOFF, paper_forward, paper_weights
from peft import PeftModel, get_peft_model
from torch import nn

from sorsa_plugin import SORSAConfig
from sorsa_plugin.errors import BaseMismatchError
from sorsa_plugin.layers.layer import sorsa_layers
from sorsa_plugin.linalg.offset_form import Parts

DTYPES = [torch.float32, torch.bfloat16]


def folded_bound(layer: Any, x: torch.Tensor) -> torch.Tensor:
    """Elementwise first-order bound on the error of a folded layer's output.

    W_r is rounded once (after r + 2 fp32 roundings), x V, U, S and V once each, the two products and their sum once
    each; inner products of `in` and r terms are accumulated in fp32. The two terms, of which neither is small, make
    up the magnitude.
    """
    residual, U, S, V = (part.abs() for part in paper_weights(layer))
    magnitude = x.double().abs() @ (residual + (U * S.abs()) @ V.T).T
    if layer.get_base_layer().bias is not None:
        magnitude = magnitude + layer.get_base_layer().bias.detach().double().abs()
    rounded = 0.0 if x.dtype == torch.float32 else 8 * ROUNDOFF[x.dtype]
    return ((layer.in_features + 2 * S.shape[0] + 8) * ROUNDOFF[torch.float32] + rounded) * magnitude


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("kind", KINDS)
def test_the_output_folded_is_the_papers_formula_in_use_and_disabled(
    kind: str, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    model, x = adapt(make_base(kind, shape, dtype)), inputs(shape[1], dtype=dtype)
    perturb(model)
    layer = only_layer(model)
    bound = folded_bound(layer, x)
    active, disabled = paper_forward(layer, x), layer.base_layer(x).detach().double()
    weight = layer.get_base_layer().weight.detach().clone()

    model.fold()

    assert not torch.equal(layer.get_base_layer().weight, weight)
    assert layer.get_base_layer().weight.dtype == dtype
    assert ((model(x).detach().double() - active).abs() <= bound).all()
    with model.disable_adapter():
        found = model(x).detach().double()
    # the reference is itself a product in this dtype
    assert ((found - disabled).abs() <= 2 * bound).all()
    if dtype != torch.bfloat16:  # where rounding the residual is as large
        assert (active - disabled).norm() > 20 * (found - disabled).norm()


@pytest.mark.parametrize("leading", [(), (5,), (2, 3)], ids=str)
@pytest.mark.parametrize("disabled", [False, True])
def test_the_gradients_folded_are_those_intact(disabled: bool, leading: tuple[int, ...]) -> None:
    """float64: a few hundred roundings of 1e-16 of values of order 10."""
    found = []
    for fold in (False, True):
        model = adapt(make_base(shape=(40, 16))).double()
        perturb(model)
        if fold:
            model.fold()
        x = torch.randn(*leading, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64).requires_grad_()
        if disabled:
            model.base_model.disable_adapter_layers()
        model(x).square().sum().backward()
        factors = only_layer(model).factors("default")
        found.append([x.grad, *(factors.get_parameter(f"d{part}").grad for part in "USV" if not disabled)])
        assert only_layer(model).get_base_layer().weight.grad is None
    for intact, folded in zip(*found, strict=True):
        torch.testing.assert_close(folded, intact, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("enabled", [False, True], ids=["plain", "autocast"])
@pytest.mark.parametrize("needs_x", [False, True])
def test_the_folded_step_agrees_with_plain_autograd(needs_x: bool, enabled: bool) -> None:
    model = adapt(make_base(shape=(40, 16)))
    perturb(model)
    model.fold()
    layer = only_layer(model)
    x = inputs(16).requires_grad_(needs_x)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
        y = model(x)
    y.float().square().sum().backward()
    leaves = [part.detach().double().requires_grad_() for part in layer.get_factors()]
    x64 = x.detach().double().requires_grad_()
    U, S, V = leaves
    base = x64 @ layer.base_matrix().detach().double().T + layer.get_base_layer().bias.detach().double()
    (base + ((x64 @ V) * S) @ U.T).square().sum().backward()
    factors = layer.factors("default")
    pairs = [(factors.get_parameter(f"d{part}").grad, leaf.grad) for part, leaf in zip("USV", leaves, strict=True)]
    pairs += [(x.grad, x64.grad)] if needs_x else []
    # ten 16-bit roundings at most on a path; in fp32 three products of up to 40 terms, 10 for sums that cancel
    tolerance = 10 * ROUNDOFF[torch.bfloat16] if enabled else 10 * 3 * 40**0.5 * ROUNDOFF[torch.float32]
    for found, expected in pairs:
        assert found.dtype == torch.float32
        assert (found.double() - expected).norm() <= tolerance * expected.norm()


@pytest.mark.parametrize("folded", [False, True])
def test_a_step_can_be_differentiated_through(folded: bool) -> None:
    """As meta-learning does: the loss after a step, with respect to where the step began."""
    model = adapt(make_base()).double()
    perturb(model)
    if folded:
        model.fold()
    layer, x = only_layer(model), inputs(24, dtype=torch.float64)
    factors = layer.factors("default")
    start = {name: factors.get_parameter(name).detach().clone() for name in ("dU", "dS", "dV")}

    def after_a_step(dU: torch.Tensor, dS: torch.Tensor, dV: torch.Tensor) -> torch.Tensor:
        names, now = ["dU", "dS", "dV"], [dU, dS, dV]
        prefix = next(n for n, p in model.named_parameters() if p is factors.dU).removesuffix("dU")

        def loss() -> torch.Tensor:
            given = {prefix + name: value for name, value in zip(names, now, strict=True)}
            return torch.func.functional_call(model, given, (x,)).square().mean()

        steps = torch.autograd.grad(loss(), now, create_graph=True)
        now[:] = [value - 0.1 * step for value, step in zip(now, steps, strict=True)]
        return loss()

    assert torch.autograd.gradcheck(after_a_step, tuple(value.requires_grad_() for value in start.values()))


def test_a_folded_model_compiles_to_one_graph() -> None:
    model, x = adapt(make_base()), inputs(24)
    perturb(model)
    model.fold()
    expected = model(x)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), expected, atol=1e-5, rtol=1e-5)
    with model.disable_adapter():
        torch.testing.assert_close(compiled(x), model(x), atol=1e-5, rtol=1e-5)
    torch._dynamo.reset()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_unfolding_restores_every_bit(dtype: torch.dtype, tokens: torch.Tensor) -> None:
    model = get_peft_model(tiny_llama(dtype), SORSAConfig(r=4, target_modules="all-linear"))
    perturb(model)
    before, logits = snapshot(model), model(tokens).logits
    model.fold()
    model.fold()  # does nothing to what is folded
    assert all(not layer.weight_state.is_whole for layer in sorsa_layers(model))
    assert not torch.equal(model(tokens).logits, logits)
    model.unfold()
    model.unfold()
    assert_same_tensors(snapshot(model), before)
    assert torch.equal(model(tokens).logits, logits)


# -- everything else while folded ------------------------------------------------------------------------------------


def changed_pair(dtype: torch.dtype = torch.float32) -> tuple[PeftModel, PeftModel]:
    """The same perturbed adapter twice: intact, and folded."""
    models = []
    for _ in range(2):
        model = get_peft_model(tiny_llama(dtype), SORSAConfig(r=4, target_modules="all-linear"))
        perturb(model)
        models.append(model)
    models[1].fold()
    return models[0], models[1]


def test_the_saved_adapter_is_the_same_file(tmp_path: Path) -> None:
    for name, model in zip(("intact", "folded"), changed_pair(), strict=True):
        model.save_pretrained(tmp_path / name)
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "intact" / file).read_bytes() == (tmp_path / "folded" / file).read_bytes()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_merging_gives_the_same_weights(dtype: torch.dtype, tokens: torch.Tensor) -> None:
    intact, folded = changed_pair(dtype)
    stored = snapshot(folded)
    for model in (intact, folded):
        model.merge_adapter()
    assert torch.equal(intact(tokens).logits, folded(tokens).logits)
    folded.unmerge_adapter()
    assert_same_tensors(snapshot(folded), stored)
    assert_same_tensors(snapshot(folded.merge_and_unload()), snapshot(intact.merge_and_unload()))


def test_unloading_a_merged_folded_model_keeps_the_merge() -> None:
    intact, folded = changed_pair()
    for model in (intact, folded):
        model.merge_adapter()
    assert_same_tensors(snapshot(folded.unload()), snapshot(intact.unload()))


def test_disabling_while_merged_and_folded_gives_the_base_models_output(tokens: torch.Tensor) -> None:
    intact, folded = changed_pair()
    folded.merge_adapter()
    with folded.disable_adapter(), intact.disable_adapter():
        torch.testing.assert_close(folded(tokens).logits, intact(tokens).logits, rtol=1e-4, atol=1e-5)


def test_delta_weight_energy_and_base_check_see_the_intact_weight() -> None:
    intact, folded = changed_pair()
    assert intact.initial_energy() == folded.initial_energy()
    for ours, theirs in zip(sorsa_layers(folded), sorsa_layers(intact), strict=True):
        assert torch.equal(ours.get_delta_weight("default"), theirs.get_delta_weight("default"))
        ours.factors("default").base_checked = False
        ours.check_base("default")
        assert ours.factors("default").base_checked


def test_deleting_the_adapter_gives_the_base_model_back() -> None:
    _, folded = changed_pair()
    folded.delete_adapter("default")
    plain, found = snapshot(tiny_llama()), snapshot(folded.base_model.model)
    assert_same_tensors({key.replace(".base_layer", ""): tensor for key, tensor in found.items()}, plain)


def test_layers_whose_adapter_was_deleted_are_passed_over() -> None:
    model = get_peft_model(tiny_llama(), SORSAConfig(r=2, target_modules=["q_proj"]))
    model.add_adapter("second", SORSAConfig(r=2, target_modules=["v_proj"]))
    model.delete_adapter("second")
    model.base_model.fold()
    folded = [layer.name for layer in sorsa_layers(model) if not layer.weight_state.is_whole]
    assert folded == [f"model.layers.{i}.self_attn.q_proj" for i in range(2)]


def test_loading_other_triplets_folds_them(tmp_path: Path, tokens: torch.Tensor) -> None:
    other = get_peft_model(tiny_llama(), SORSAConfig(r=4, target_modules="all-linear", svd="randomized", svd_seed=3))
    with torch.no_grad():  # other triplets of the same base: the second best
        for layer in sorsa_layers(other):
            factors = layer.factors("default")
            U, S, Vh = torch.linalg.svd(layer.base_matrix())
            factors.U0.copy_(U[:, 4:8]), factors.S0.copy_(S[4:8]), factors.V0.copy_(Vh[4:8].mT)
    perturb(other)
    expected = other(tokens).logits
    _, folded = changed_pair()
    folded.load_state_dict({key: value for key, value in other.state_dict().items() if "sorsa_" in key}, strict=False)
    torch.testing.assert_close(folded(tokens).logits, expected, rtol=1e-4, atol=1e-4)
    folded.unfold()
    assert torch.equal(folded(tokens).logits, expected)


def test_an_adapter_of_another_base_is_refused_while_folded() -> None:
    _, folded = changed_pair()
    other = get_peft_model(tiny_llama(seed=1), SORSAConfig(r=4, target_modules="all-linear"))
    state = {key: value for key, value in other.state_dict().items() if "sorsa_" in key}
    with pytest.raises(BaseMismatchError, match="was not trained on this base model"):
        folded.load_state_dict(state, strict=False)


def test_a_folded_state_dict_is_refused_by_an_intact_model() -> None:
    intact, folded = changed_pair()
    with pytest.raises(BaseMismatchError):
        intact.load_state_dict(folded.state_dict())


def test_a_copy_and_a_cast_take_the_kept_weight_along(tokens: torch.Tensor) -> None:
    intact, folded = changed_pair()
    copied = copy.deepcopy(folded)
    copied.unfold()
    assert torch.equal(copied(tokens).logits, intact(tokens).logits)
    assert all(not layer.weight_state.is_whole for layer in sorsa_layers(folded))
    folded.to(torch.bfloat16).unfold()
    assert_same_tensors(snapshot(folded), snapshot(intact.to(torch.bfloat16)))


def test_only_parts_and_x_and_x_times_v_are_kept_for_backward() -> None:
    model = adapt(make_base())
    model.fold()
    parts: Parts = only_layer(model).factors("default").parts()
    x, kept = inputs(24, rows=64).requires_grad_(), []
    own = {part.untyped_storage().data_ptr() for part in (*parts, x, *only_layer(model).base_layer.parameters())}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            kept.append(tensor.untyped_storage().nbytes())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(x)
    assert kept == [64 * 4 * 4]


class Reader(nn.Module):
    """Reads the weight off a layer instead of calling it, as Mamba does with `dt_proj`."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(6, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.proj.weight, self.proj.bias)


def test_a_model_that_reads_the_weight_reads_w_folded_or_not() -> None:
    base, x = Reader(), torch.randn(3, 6, generator=torch.Generator().manual_seed(0))
    expected = base(x)
    model = get_peft_model(base, SORSAConfig(r=2, target_modules=["proj"]))
    model.fold()
    assert torch.equal(model(x), expected)
    model.unfold()
    assert torch.equal(model(x), expected)
    perturb(model)
    model.merge_adapter()
    merged = model(x)
    assert not torch.equal(merged, expected)
    model.unmerge_adapter()
    model.fold()
    model.merge_adapter()
    torch.testing.assert_close(model(x), merged)
