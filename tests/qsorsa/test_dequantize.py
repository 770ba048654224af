"""Quantised linears become ordinary ones, with adapters merged and rounded once, or as they are."""

from __future__ import annotations

import copy
import logging
from typing import Any

import pytest
import torch
from builders.adapters import perturb
from builders.one_layer import adapt, inputs, only_layer
from builders.quantised import IN, kinds, quantised_base

from sorsa_plugin import merge_and_dequantize

pytest.importorskip("bitsandbytes")


def exact_change(layer: Any, x: torch.Tensor, adapter: str = "default") -> torch.Tensor:
    L, R = (part.detach().double() for part in layer.factors(adapter).low_rank_pair())
    return (x.detach().double() @ R) @ L.T


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("kind", kinds("nf4-double", "int8-outliers", "torchao-groups"))
def test_merged_without_quantisation_the_weight_is_rounded_once(
    kind: str, dtype: torch.dtype, caplog: pytest.LogCaptureFixture
) -> None:
    model, x = adapt(quantised_base(kind)), inputs(IN)
    perturb(model)
    layer = only_layer(model)
    exact = layer.base_matrix().double() + layer.get_delta_weight("default").detach().double()
    bias = layer.get_base_layer().bias.detach().clone()
    with caplog.at_level(logging.WARNING):
        plain = merge_and_dequantize(model, dtype)
    assert type(plain.proj) is torch.nn.Linear
    assert plain.proj.weight.dtype == plain.proj.bias.dtype == dtype
    # fp32 sums of IN terms before the one rounding; float16's smallest steps are absolute
    unit = {torch.bfloat16: 2**-8, torch.float16: 2**-11, torch.float32: 2**-24}[dtype]
    bound = (unit + 8 * 2**-24) * exact.abs() + 1e-6
    assert ((plain.proj.weight.double() - exact).abs() <= bound).all()
    assert torch.equal(plain.proj.bias, bias.to(dtype))
    assert str(dtype).removeprefix("torch.") in caplog.text
    assert plain(x.to(dtype)).dtype == dtype


def test_dequantising_reads_quantised_modules_without_an_adapter() -> None:
    base = quantised_base("nf4")
    base.add_module("other", quantised_base("int8", seed=1).proj)
    expected = only_layer(adapt(quantised_base("int8", seed=1))).base_matrix()
    plain = merge_and_dequantize(adapt(base), torch.float32)
    assert type(plain.other) is torch.nn.Linear
    torch.testing.assert_close(plain.other.weight.data, expected, rtol=0, atol=0)


def test_dequantising_merges_beside_what_is_merged_already_and_no_adapter_where_none_is_named() -> None:
    model, x = adapt(quantised_base("nf4")).eval(), inputs(IN)
    model.add_adapter("second", model.peft_config["default"])
    perturb(model)
    perturb(model, "second", seed=9)
    none = copy.deepcopy(model)
    with model.disable_adapter():
        base = model(x)
    changes = {name: exact_change(only_layer(model), x, name) for name in ("default", "second")}
    model.merge_adapter(["second"])
    both = merge_and_dequantize(model, torch.float32)(x)
    torch.testing.assert_close(both.double(), base + changes["default"] + changes["second"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(merge_and_dequantize(none, torch.float32, [])(x), base, rtol=1e-5, atol=1e-5)


def test_dequantising_with_an_unknown_adapter_is_refused() -> None:
    model = adapt(quantised_base("nf4"))
    with pytest.raises(ValueError, match="adapter_names has defualt; the model has default"):
        merge_and_dequantize(model, adapter_names=["defualt"])
    assert only_layer(model).quantised


def test_dequantising_into_integers_is_refused() -> None:
    with pytest.raises(ValueError, match=r"dtype is torch.int8; expected a floating-point one"):
        merge_and_dequantize(adapt(quantised_base("nf4")), torch.int8)
