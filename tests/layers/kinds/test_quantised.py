"""One quantised layer of each kind: what the adapter computes, trains, merges and saves, against float64."""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from builders.adapters import assert_same_tensors, perturb
from builders.one_layer import adapt, inputs, only_layer
from builders.quantised import IN, KINDS, OUT, base_tensors, kinds, quantised_base, rounding_bound
from builders.references import ROUNDOFF
from peft import LoraConfig, PeftModel, convert_to_lora, get_peft_model

from sorsa_plugin import SORSAConfig
from sorsa_plugin.errors import BaseMismatchError, FoldError

pytest.importorskip("bitsandbytes")


EXACT = 10 * 3 * IN**0.5 * ROUNDOFF[torch.float32]
"""Relative error, in norm, of three fp32 products in a row of up to IN terms, with a factor of 10 for cancellation."""


def exact_change(layer: Any, x: torch.Tensor, adapter: str = "default") -> torch.Tensor:
    L, R = (part.detach().double() for part in layer.factors(adapter).low_rank_pair())
    return (x.detach().double() @ R) @ L.T


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("shape", [(5, IN), (2, 3, IN)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_a_new_adapter_leaves_the_output_bit_equal(
    kind: str, shape: tuple[int, ...], training: bool, dtype: torch.dtype
) -> None:
    base = quantised_base(kind, dtype=dtype).train(training)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    expected, tensors = base(x), base_tensors(base)
    model = adapt(base).train(training)
    assert torch.equal(model(x), expected)
    assert_same_tensors(_only(model), _only(tensors))


def _only(source: Any) -> dict[str, torch.Tensor]:
    """The parts of the one base layer, whatever wraps it."""
    tensors = source if isinstance(source, dict) else base_tensors(source)
    return {name.rpartition(".")[2]: tensor for name, tensor in tensors.items()}


@pytest.mark.parametrize("kind", KINDS)
def test_the_factors_are_those_of_the_dequantised_weight(kind: str) -> None:
    """The exact decomposition: U0 S0 V0^T is as near to the dequantised weight as float64's is, to fp32 rounding."""
    base = quantised_base(kind)
    rounded = quantised_base(kind).proj
    layer = only_layer(adapt(base, svd="exact"))
    weight = layer.base_matrix().double()
    plain = torch.randn(OUT, IN, generator=torch.Generator().manual_seed(0)).double() * IN**-0.5
    assert ((weight - plain).abs() <= rounding_bound(kind, plain)).all()
    factors = layer.factors("default")
    rest = (weight - factors.initial_matrix().double()).square().sum()
    assert float(rest) == pytest.approx(float(torch.linalg.svdvals(weight)[4:].square().sum()), rel=1e-5)
    assert type(rounded) is type(layer.get_base_layer())


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_change_is_the_papers_on_top_of_the_bases_output(kind: str, training: bool) -> None:
    base, x = quantised_base(kind).train(training), inputs(IN)
    before = base(x).double()
    model = adapt(base).train(training)
    perturb(model, scale=0.3)
    layer = only_layer(model)
    change = exact_change(layer, x)
    assert change.norm() > 0.1 * before.norm()
    # the sum is rounded once more, where it can be larger than the change
    bound = EXACT * change.norm() + 2 * ROUNDOFF[torch.float32] * before.norm()
    assert (model(x).double() - before - change).norm() <= bound


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_the_formula_on_the_dequantised_weight(kind: str) -> None:
    model = adapt(quantised_base(kind)).train()
    perturb(model)
    layer = only_layer(model)
    x = inputs(IN).requires_grad_()
    g = torch.randn(5, OUT, generator=torch.Generator().manual_seed(5))
    model(x).backward(g)

    weight = layer.base_matrix().double()
    factors = layer.factors("default")
    residual = weight - factors.initial_matrix().double()
    leaves = [part.detach().double().requires_grad_() for part in layer.get_factors()]
    x64 = x.detach().double().requires_grad_()
    U, S, V = leaves
    (x64 @ residual.T + ((x64 @ V) * S) @ U.T).backward(g.double())
    pairs = [(factors.get_parameter(f"d{part}").grad, leaf.grad) for part, leaf in zip("USV", leaves, strict=True)]
    for found, expected in [*pairs, (x.grad, x64.grad)]:
        assert (found.double() - expected).norm() <= EXACT * expected.norm()


@pytest.mark.parametrize("kind", KINDS)
def test_training_moves_the_factors_and_nothing_else(kind: str) -> None:
    model = adapt(quantised_base(kind), gamma=4e-4).train()
    before, x = base_tensors(model), inputs(IN)
    target = torch.randn(5, OUT, generator=torch.Generator().manual_seed(2))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    losses = []
    for _ in range(5):
        loss = (model(x) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert all(
        offset.dtype == torch.float32 and offset.any() for offset in only_layer(model).factors("default").parts()[:3]
    )
    assert_same_tensors(base_tensors(model), before)


@pytest.mark.parametrize("kind", KINDS)
def test_disabled_the_output_is_the_bases_bit_for_bit(kind: str) -> None:
    base, x = quantised_base(kind), inputs(IN)
    expected = base(x)
    model = adapt(base)
    perturb(model)
    assert not torch.equal(model(x), expected)
    with model.disable_adapter():
        assert torch.equal(model(x), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_several_adapters_are_chosen_added_and_deleted(kind: str) -> None:
    base, x = quantised_base(kind), inputs(IN)
    before = base(x).double()
    model = adapt(base)
    model.add_adapter("other", model.peft_config["default"])
    layer = only_layer(model)
    assert torch.equal(layer.factors("other").U0, layer.factors("default").U0)
    perturb(model)
    perturb(model, "other", seed=9)
    changes = {name: exact_change(layer, x, name) for name in ("default", "other")}
    for chosen in (["default"], ["other"], ["default", "other"]):
        model.base_model.set_adapter(chosen)
        change = sum(changes[name] for name in chosen)
        assert (model(x).double() - before - change).norm() <= EXACT * (before.norm() + change.norm())
    model.delete_adapter("default")
    model.set_adapter("other")
    assert (model(x).double() - before - changes["other"]).norm() <= EXACT * (before.norm() + change.norm())


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_adapter_gives_the_same_bits_on_the_base_quantised_again(kind: str, tmp_path: Path) -> None:
    model, x = adapt(quantised_base(kind)).eval(), inputs(IN)  # as from_pretrained gives it: int8 multiplies otherwise
    perturb(model)
    expected = model(x)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(quantised_base(kind), tmp_path)
    assert torch.equal(loaded(x), expected)
    with pytest.raises(BaseMismatchError, match="fingerprint of proj"):
        PeftModel.from_pretrained(quantised_base(kind, seed=1), tmp_path)


@pytest.mark.parametrize("kind", kinds("int8", "torchao-rows", "fp4-double"))
def test_the_same_weight_stored_otherwise_takes_the_adapter(kind: str, tmp_path: Path) -> None:
    """Trained on nf4, served on int8: W is the same weight."""
    adapt(quantised_base("nf4")).save_pretrained(tmp_path)
    PeftModel.from_pretrained(quantised_base(kind), tmp_path)


@pytest.mark.parametrize("kind", KINDS)
def test_peft_converts_the_change_to_lora(kind: str) -> None:
    model = adapt(quantised_base(kind))
    perturb(model)
    change = only_layer(model).get_delta_weight("default").double()
    _, tensors = convert_to_lora(model, rank=8)  # 2r: exact
    A, B = (tensors[f"base_model.model.proj.lora_{part}.weight"].double() for part in "AB")
    assert (B @ A - change).norm() <= EXACT * change.norm()


@pytest.mark.parametrize("kind", KINDS)
def test_merging_rounds_once_within_the_codes_step_and_unmerging_restores_every_bit(
    kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    model, x = adapt(quantised_base(kind)), inputs(IN)
    perturb(model)
    layer = only_layer(model)
    before, output, weight = base_tensors(model), model(x), layer.base_matrix()
    exact = weight.double() + layer.get_delta_weight("default").detach().double()

    with caplog.at_level(logging.WARNING):
        model.merge_adapter()

    merged = layer.base_matrix().double()
    assert ((merged - exact).abs() <= rounding_bound(kind, exact)).all()
    assert type(layer.get_base_layer().weight) is type(quantised_base(kind).proj.weight)
    lost = (merged - exact).norm()
    assert layer.merge_error.of_weight == pytest.approx(float(lost / exact.norm()), rel=1e-3)
    change = layer.get_delta_weight("default").detach().double().norm()
    assert layer.merge_error.of_change == pytest.approx(float(lost / change), rel=1e-3)
    assert "the rounding is up to" in caplog.text
    assert "merge_and_dequantize" in caplog.text
    fresh = copy.deepcopy(layer.get_base_layer())
    assert torch.equal(model(x), fresh(x))

    model.unmerge_adapter()
    assert_same_tensors(base_tensors(model), before)
    assert torch.equal(model(x), output)
    assert layer.merge_error is None


@pytest.mark.parametrize("kind", KINDS)
def test_a_weight_of_zeros_merges(kind: str) -> None:
    model = adapt(quantised_base(kind, scale=0.0))
    model.merge_adapter()
    assert only_layer(model).merge_error == (0.0, 0.0)
    assert not only_layer(model).base_matrix().any()


@pytest.mark.parametrize("kind", KINDS)
def test_merged_and_unloaded_the_base_is_of_its_own_kind(kind: str) -> None:
    model = adapt(quantised_base(kind))
    perturb(model)
    layer = only_layer(model)
    exact = layer.base_matrix().double() + layer.get_delta_weight("default").detach().double()
    model(inputs(IN))
    unloaded = model.merge_and_unload()
    if kind.startswith("int8"):
        assert unloaded.proj.state.CB is None  # not the weight of the last forward
    assert type(unloaded.proj) is type(quantised_base(kind).proj)
    again = only_layer(adapt(unloaded))
    assert ((again.base_matrix().double() - exact).abs() <= rounding_bound(kind, exact)).all()


def test_mixed_batches_give_each_row_its_adapter() -> None:
    model, x = adapt(quantised_base("nf4")).eval(), inputs(IN)
    model.add_adapter("other", model.peft_config["default"])
    perturb(model)
    perturb(model, "other", seed=9)
    names = ["default", "other", "__base__", "other", "default"]
    mixed = model(x, adapter_names=names)
    for row, name in enumerate(names):
        if name == "__base__":
            with model.disable_adapter():
                expected = model(x)[row]
        else:
            model.set_adapter(name)
            expected = model(x)[row]
        torch.testing.assert_close(mixed[row], expected, rtol=1e-5, atol=1e-5)


def test_folding_a_quantised_weight_is_refused() -> None:
    model = adapt(quantised_base("nf4"))
    with pytest.raises(FoldError, match="proj cannot be folded: its weight is quantised"):
        model.fold()


def test_evaluating_on_a_cpu_leaves_training_possible() -> None:
    """bitsandbytes repacks 4-bit weights in eval mode on some CPUs, and no gradient passes afterwards."""
    base = quantised_base("nf4")
    base.proj.support_avx512bf16_for_cpu = True
    model = adapt(base)
    before = base_tensors(model)
    with torch.no_grad():
        model.eval()(inputs(IN))
    x = inputs(IN).requires_grad_()
    model.train()(x).sum().backward()
    assert x.grad.norm() > 0
    assert_same_tensors(base_tensors(model), before)


def test_the_state_dict_of_a_merged_layer_holds_no_copy_of_its_original() -> None:
    model = adapt(quantised_base("nf4"))
    names = list(model.state_dict())
    parameters = sum(1 for _ in model.parameters())
    model.merge_adapter()
    assert list(model.state_dict()) == names
    assert sum(1 for _ in model.parameters()) == parameters


@pytest.mark.parametrize("kind", ["nf4", "nf4-in-bfloat16", "int8"])
@pytest.mark.parametrize("computes_in", [torch.bfloat16, None], ids=str)
def test_without_autocast_the_offsets_have_the_dtype_that_loras_tensors_have(kind: str, computes_in: Any) -> None:
    dtypes = []
    for config in (LoraConfig(r=4, target_modules=["proj"]), SORSAConfig(r=4, target_modules=["proj"])):
        base = quantised_base(kind)
        if kind != "int8":
            base.proj.compute_dtype = computes_in
        model = get_peft_model(base, config, autocast_adapter_dtype=False)
        dtypes.append({p.dtype for p in model.parameters() if p.requires_grad})
    assert dtypes[0] == dtypes[1] == {computes_in if computes_in and kind != "int8" else torch.float32}
