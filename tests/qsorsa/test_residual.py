"""QSORSA: the base stores the quantised residual, and everything means what it means on an intact base."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from builders.adapters import assert_same_tensors, perturb
from builders.one_layer import adapt, inputs, make_base, only_layer
from builders.quantised import (
    FOUR_BITS,
    IN,
    KINDS,
    OUT,
    base_tensors,
    kinds,
    quantised_base,
    rounding_bound,
)
from builders.references import ROUNDOFF
from peft import PeftModel, get_peft_model

from sorsa_plugin import SORSAConfig, merge_and_dequantize, quantize_residual
from sorsa_plugin.errors import BaseMismatchError, FoldError, SORSAConfigError
from sorsa_plugin.layers.layer import sorsa_layers
from sorsa_plugin.qsorsa.full_precision_weights import full_precision_weights

pytest.importorskip("bitsandbytes")


EXACT = 10 * 3 * IN**0.5 * ROUNDOFF[torch.float32]
"""As in test_quantised_kinds.py."""


def plain_weight(seed: int = 0) -> torch.Tensor:
    """W of `quantised_linear` before it was quantised."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(OUT, IN, generator=generator) * IN**-0.5


def on_residual(kind: str, seed: int = 0, **options: Any) -> PeftModel:
    config = SORSAConfig(r=4, target_modules=["proj"], svd="exact", **options)
    return quantize_residual(quantised_base(kind, seed), config, {"proj.weight": plain_weight(seed)})


def whole(layer: Any, change: bool = False) -> torch.Tensor:
    """Q(W_r) + U0 S0 V0^T, or + U S V^T, in float64."""
    U, S, V = (part.detach().double() for part in layer.get_factors())
    factors = layer.factors("default")
    triplets = (U * S) @ V.T if change else (factors.U0.double() * factors.S0.double()) @ factors.V0.double().T
    return layer.base_matrix().double() + triplets


@pytest.mark.parametrize("kind", KINDS)
def test_the_base_stores_the_quantised_residual_of_the_full_weight(kind: str) -> None:
    """The factors are W's own, not the dequantised weight's, and what is stored is within a step of W_r."""
    layer = only_layer(on_residual(kind))
    W = plain_weight().double()
    U, S, _ = torch.linalg.svd(W, full_matrices=False)
    U, S = U[:, :4], S[:4]
    factors = layer.factors("default")
    torch.testing.assert_close(factors.S0.double(), S, rtol=1e-5, atol=0)
    torch.testing.assert_close((factors.U0.double() * U).sum(0).abs(), torch.ones(4).double(), rtol=0, atol=1e-4)
    residual = W - factors.initial_matrix().double()
    assert ((layer.base_matrix().double() - residual).abs() <= rounding_bound(kind, residual)).all()


@pytest.mark.parametrize("kind", KINDS)
def test_the_whole_weight_is_nearer_to_the_full_one_than_plain_quantisation(
    kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        layer = only_layer(on_residual(kind))
    W = plain_weight().double()
    plain = (only_layer_matrix(kind) - W).norm() / W.norm()
    ours = (whole(layer) - W).norm() / W.norm()
    assert ours < plain
    assert layer.rounding == pytest.approx((float(plain), float(ours)), rel=1e-4)
    assert f"mean relative error is {float(ours):.3g}, and {float(plain):.3g} without" in caplog.text


def only_layer_matrix(kind: str) -> torch.Tensor:
    return only_layer(adapt(quantised_base(kind))).base_matrix().double()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_in_use_and_disabled_the_outputs_are_the_formulas(kind: str, dtype: torch.dtype) -> None:
    model, x = on_residual(kind).train(), inputs(IN, dtype=dtype)
    if dtype == torch.bfloat16:
        only_layer(model).get_base_layer().bias.data = only_layer(model).get_base_layer().bias.data.to(dtype)
    layer = only_layer(model)
    bias = layer.get_base_layer().bias.detach().double()
    with model.disable_adapter():
        disabled = model(x)
    assert torch.equal(model(x), disabled)  # bit for bit: an untrained adapter is no adapter
    perturb(model, scale=0.3)
    # 16 bits: bitsandbytes rounds the weight, both products and their sum
    tolerance = EXACT if dtype == torch.float32 else 6 * ROUNDOFF[torch.bfloat16]
    for found, weight in ((disabled, whole(layer)), (model(x), whole(layer, change=True))):
        expected = x.double() @ weight.T + bias
        assert (found.detach().double() - expected).norm() <= tolerance * expected.norm()
    with model.disable_adapter():
        assert torch.equal(model(x), disabled)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_the_papers_form(kind: str) -> None:
    model = on_residual(kind).train()
    perturb(model)
    layer = only_layer(model)
    x = inputs(IN).requires_grad_()
    g = torch.randn(5, OUT, generator=torch.Generator().manual_seed(5))
    model(x).backward(g)
    leaves = [part.detach().double().requires_grad_() for part in layer.get_factors()]
    x64 = x.detach().double().requires_grad_()
    U, S, V = leaves
    (x64 @ layer.base_matrix().double().T + ((x64 @ V) * S) @ U.T).backward(g.double())
    factors = layer.factors("default")
    pairs = [(factors.get_parameter(f"d{part}").grad, leaf.grad) for part, leaf in zip("USV", leaves, strict=True)]
    for found, expected in [*pairs, (x.grad, x64.grad)]:
        assert found.dtype == torch.float32
        assert (found.double() - expected).norm() <= EXACT * expected.norm()


@pytest.mark.parametrize("kind", kinds("nf4-double", "int8-outliers", "torchao-rows"))
def test_training_moves_the_factors_and_never_the_residual(kind: str) -> None:
    model = on_residual(kind).train()
    before, x = base_tensors(model), inputs(IN)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    for _ in range(3):
        model(x).square().mean().backward()
        optimizer.step()
    assert all(offset.any() for offset in only_layer(model).factors("default").parts()[:3])
    assert_same_tensors(base_tensors(model), before)


@pytest.mark.parametrize("kind", KINDS)
def test_merging_makes_the_weight_whole(kind: str) -> None:
    model, x = on_residual(kind).train(), inputs(IN)
    perturb(model)
    layer = only_layer(model)
    exact, before, output = whole(layer, change=True), base_tensors(model), model(x)
    model.merge_adapter()
    assert ((layer.base_matrix().double() - exact).abs() <= rounding_bound(kind, exact)).all()
    model.unmerge_adapter()
    assert_same_tensors(base_tensors(model), before)
    assert torch.equal(model(x), output)
    plain = merge_and_dequantize(model, torch.float32)
    assert (plain.proj.weight.double() - exact).norm() <= 8 * ROUNDOFF[torch.float32] * exact.norm()


def test_merged_and_unloaded_the_weight_is_whole() -> None:
    model = on_residual("nf4")
    perturb(model)
    exact = whole(only_layer(model), change=True)
    again = only_layer(adapt(model.merge_and_unload()))
    assert ((again.base_matrix().double() - exact).abs() <= rounding_bound("nf4", exact)).all()


@pytest.mark.parametrize("names", [None, [], ["narrow"]], ids=str)
def test_unloaded_every_weight_is_whole_merged_or_not(names: list[str] | None) -> None:
    """An adapter on some of the layers merges into these; the others' triplets are not lost with the first adapter."""
    base, options = quantised_base("nf4"), {"r": 4, "svd": "exact", "residual_base": True}
    base.add_module("other", quantised_base("nf4", seed=1).proj)
    weights = {"proj.weight": plain_weight(), "other.weight": plain_weight(1)}
    model = quantize_residual(base, SORSAConfig(target_modules=["proj", "other"], **options), weights)
    exact = {layer.name: whole(layer) for layer in sorsa_layers(model)}
    model.add_adapter("narrow", SORSAConfig(target_modules=["proj"], **options))
    model.set_adapter("narrow")
    unloaded = adapt(model.merge_and_unload(adapter_names=names), target_modules=["proj", "other"])
    for layer in sorsa_layers(unloaded):
        error = (layer.base_matrix().double() - exact[layer.name]).abs()
        assert (error <= rounding_bound("nf4", exact[layer.name])).all(), layer.name


def test_dropout_drops_the_input_of_the_change_alone() -> None:
    model, x = on_residual("nf4", sorsa_dropout=0.5).train(), inputs(IN)
    with model.disable_adapter():
        expected = model(x)
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)  # the change is zero, whatever is dropped
    perturb(model, scale=0.3)
    torch.manual_seed(0)
    first = model(x)
    assert not torch.equal(model(x), first)
    torch.testing.assert_close(
        model.eval()(x).double(),
        x.double() @ whole(only_layer(model), change=True).T + only_layer(model).get_base_layer().bias.double(),
        rtol=1e-4, atol=1e-4,
    )  # fmt: skip


def test_mixed_batches_on_a_residual() -> None:
    model, x = on_residual("nf4").eval(), inputs(IN)
    model.add_adapter("other", model.peft_config["default"])
    perturb(model)
    perturb(model, "other", seed=9)
    mixed = model(x, adapter_names=["default", "other", "__base__", "other", "default"])
    for row, name in ((0, "default"), (1, "other")):
        model.set_adapter(name)
        torch.testing.assert_close(mixed[row], model(x)[row], rtol=1e-5, atol=1e-5)
    with model.disable_adapter():
        torch.testing.assert_close(mixed[2], model(x)[2], rtol=1e-5, atol=1e-5)


def test_a_second_adapter_says_nothing_of_residuals_that_were_there(caplog: pytest.LogCaptureFixture) -> None:
    model = on_residual("nf4")
    assert "Quantised the residuals" in caplog.text
    caplog.clear()
    model.add_adapter("other", model.peft_config["default"])
    assert "Quantised the residuals" not in caplog.text


def test_several_adapters_share_the_triplets_and_add_their_changes() -> None:
    model, x = on_residual("nf4").train(), inputs(IN)
    model.add_adapter("other", model.peft_config["default"])
    perturb(model)
    perturb(model, "other", seed=9)
    layer = only_layer(model)
    assert torch.equal(layer.factors("other").U0, layer.factors("default").U0)
    model.base_model.set_adapter(["default", "other"])
    exact = whole(layer) + sum(layer.get_delta_weight(name).detach().double() for name in ("default", "other"))
    expected = x.double() @ exact.T + layer.get_base_layer().bias.double()
    assert (model(x).double() - expected).norm() <= EXACT * expected.norm()
    model.delete_adapter("default")
    model.set_adapter("other")
    expected = x.double() @ (layer.base_matrix().double() + layer.factors("other").initial_matrix().double()).T
    expected = expected + x.double() @ layer.get_delta_weight("other").detach().double().T
    expected = expected + layer.get_base_layer().bias.double()
    assert (model(x).double() - expected).norm() <= EXACT * expected.norm()


def test_what_cannot_be_on_a_residual_is_refused() -> None:
    model = on_residual("nf4")
    with pytest.raises(FoldError, match="every adapter on it has rank 4; 'two' has 2"):
        model.add_adapter("two", SORSAConfig(r=2, target_modules=["proj"], svd="exact", residual_base=True))
    model = on_residual("nf4")
    with pytest.raises(FoldError, match="stores quantised residuals: its largest singular triplets are in the adapter"):
        model.add_adapter("intact", SORSAConfig(r=4, target_modules=["proj"], svd="exact"))
    model = on_residual("nf4")
    with pytest.raises(FoldError, match="Give it the same svd, svd_seed"):
        model.add_adapter("other", SORSAConfig(r=4, target_modules=["proj"], svd_seed=1, residual_base=True))
    model = on_residual("nf4")
    with pytest.raises(FoldError, match="there is no W to put back"):
        model.unload()
    with pytest.raises(FoldError, match="there is no W to put back"):
        model.delete_adapter("default")
    with pytest.raises(FoldError, match="there is no W to put back"):
        model.unfold()


def test_an_unquantised_base_has_no_residual_to_quantise() -> None:
    with pytest.raises(BaseMismatchError, match=r"residual_base=True, and proj \(Linear\) is not quantised"):
        get_peft_model(make_base(), SORSAConfig(r=4, target_modules=["proj"], residual_base=True))


def test_a_weight_of_zeros_is_its_own_residual() -> None:
    base, config = quantised_base("nf4", scale=0.0), SORSAConfig(r=4, target_modules=["proj"])
    model = quantize_residual(base, config, {"proj.weight": torch.zeros(OUT, IN)})
    assert only_layer(model).rounding == (0.0, 0.0)


def test_options_that_contradict_a_residual_are_refused() -> None:
    with pytest.raises(SORSAConfigError, match="init_weights=False"):
        SORSAConfig(residual_base=True, init_weights=False)
    with pytest.raises(SORSAConfigError, match="without residual_base=True"):
        SORSAConfig(full_precision_base="somewhere")


@pytest.mark.parametrize("kind", kinds("nf4-double", "int8", "torchao-groups"))
def test_a_saved_adapter_makes_its_residual_again(kind: str, tmp_path: Path) -> None:
    model, x = on_residual(kind).eval(), inputs(IN)
    perturb(model)
    expected, tensors = model(x), base_tensors(model)
    model.save_pretrained(tmp_path)
    with full_precision_weights({"proj.weight": plain_weight()}):
        loaded = PeftModel.from_pretrained(quantised_base(kind), tmp_path)
    assert torch.equal(loaded(x), expected)
    assert_same_tensors(base_tensors(loaded), tensors)
    with (
        pytest.raises(BaseMismatchError),
        full_precision_weights({"proj.weight": plain_weight(1)}),
    ):
        PeftModel.from_pretrained(quantised_base(kind, seed=1), tmp_path)


# -- whole models ----------------------------------------------------------------------------------------------------


def config(**options: Any) -> SORSAConfig:
    return SORSAConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", residual_base=True, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", FOUR_BITS)
def test_a_residual_is_stored_with_the_settings_of_the_weight(kind: str, dtype: torch.dtype) -> None:
    intact = quantised_base(kind, dtype=dtype).proj.weight
    model = quantize_residual(
        quantised_base(kind, dtype=dtype), SORSAConfig(r=4, target_modules=["proj"]), {"proj.weight": plain_weight()}
    )
    weight = only_layer(model).get_base_layer().weight
    for name in ("quant_type", "blocksize", "nested", "dtype", "shape"):
        assert getattr(weight.quant_state, name) == getattr(intact.quant_state, name), name
    assert (weight.dtype, weight.shape) == (intact.dtype, intact.shape)


def test_an_adapter_that_the_base_needs_stays_merged_when_its_deletion_is_refused() -> None:
    layer = only_layer(on_residual("4bit" if "4bit" in KINDS else KINDS[0]))
    layer.merge()
    with pytest.raises(FoldError, match="no W to put back"):
        layer.delete_adapter("default")
    assert layer.merged_adapters == ["default"]
