"""Merging: rounded once, undone bit for bit, with PEFT's own messages."""

from __future__ import annotations

import hashlib

import pytest
import torch
from builders.adapters import perturb
from builders.llama import tiny_llama
from builders.one_layer import KINDS, SHAPES, adapt, inputs, make_base, only_layer
from builders.references import ROUNDOFF, forward_bound, paper_forward, paper_weights
from torch import nn

from sorsa_plugin import SORSAConfig

DTYPES = [torch.float32, torch.bfloat16]
U32 = ROUNDOFF[torch.float32]


def digest(module: nn.Module) -> str:
    """SHA-256 of every base weight and bias of a model with SORSA layers."""
    found = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        if "sorsa_" not in name:
            found.update(name.encode() + tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def merged_reference(layer, adapters=("default",)) -> torch.Tensor:
    """W + sum (U S V^T - U0 S0 V0^T) in float64 (out x in)."""
    W = layer.base_matrix().detach().double()
    total = W.clone()
    for adapter in adapters:
        residual, U, S, V = paper_weights(layer, adapter)
        total += residual + (U * S) @ V.T - W
    return total


def merged_bound(layer, reference, adapters=("default",)) -> torch.Tensor:
    """One rounding of the result to the weight's dtype, plus the fp32 error of L R^T (2r terms, 4 roundings) and of
    adding it."""
    dtype = layer.get_base_layer().weight.dtype
    bound = ROUNDOFF[dtype] * reference.abs() + 2 * U32 * layer.base_matrix().detach().double().abs()
    for adapter in adapters:
        L, R = (part.detach().double().abs() for part in layer.factors(adapter).low_rank_pair())
        bound += (R.shape[1] + 6) * U32 * (1 + ROUNDOFF[dtype]) * (L @ R.T)
    return bound


pytestmark = pytest.mark.filterwarnings("ignore:Already following adapters were merged:UserWarning")


def two_adapters(dtype=torch.float32, shape=(40, 16)):
    model = adapt(make_base("linear", shape, dtype), r=4)
    model.add_adapter("second", SORSAConfig(r=2, target_modules=["proj"]))
    perturb(model, seed=1)
    perturb(model, "second", seed=2)
    return model, only_layer(model)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rank", [1, 16])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("kind", KINDS)
def test_merge_and_unload_is_the_papers_weight_in_float64_rounded_once(kind, shape, rank, dtype):
    model = adapt(make_base(kind, shape, dtype), r=rank)
    perturb(model)
    layer = only_layer(model)
    reference = merged_reference(layer)
    bound = merged_bound(layer, reference)
    merged = model.merge_and_unload()
    assert type(merged.proj) is type(make_base(kind).proj)
    assert not [name for name in merged.state_dict() if "sorsa" in name]
    weight = merged.proj.weight.T if kind == "conv1d" else merged.proj.weight
    assert weight.dtype == dtype
    assert ((weight.detach().double() - reference).abs() <= bound).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_the_merged_output_is_the_unmerged_one_up_to_rounding(kind, dtype):
    model, x = adapt(make_base(kind, (40, 16), dtype)), inputs(16, dtype=dtype)
    perturb(model)
    layer = only_layer(model)
    exact = paper_forward(layer, x)
    # the merged weight is rounded once to its dtype (u |W_merged|, seen through |x|), the product as in forward_bound
    rounding = x.double().abs() @ (ROUNDOFF[dtype] * merged_reference(layer).abs()).T
    bound = forward_bound(layer, x) + rounding
    model.merge_adapter()
    assert layer.merged
    assert ((model(x).detach().double() - exact).abs() <= bound).all()


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_safe_merge_of_a_broken_adapter_is_pefts_error_and_leaves_the_weight_alone(broken):
    model = adapt(make_base())
    perturb(model)
    before = digest(model)
    with torch.no_grad():
        only_layer(model).factors("default").dS[0] = broken
    message = "NaNs detected in the merged weights. The adapter default seems to be broken"
    with pytest.raises(ValueError, match=message):
        model.merge_adapter(safe_merge=True)
    assert digest(model) == before
    assert not only_layer(model).merged
    with pytest.raises(ValueError, match=message):
        model.merge_and_unload(safe_merge=True)
    assert digest(model) == before


def test_a_broken_second_adapter_leaves_the_merge_of_the_first_alone():
    model, layer = two_adapters()
    with torch.no_grad():
        layer.factors("second").dU[0, 0] = float("nan")
    original = digest(model)
    model.merge_adapter(["default"])
    merged = digest(model)
    with pytest.raises(ValueError, match="The adapter second seems to be broken"):
        model.merge_adapter(["second"], safe_merge=True)
    assert digest(model) == merged
    assert layer.merged_adapters == ["default"]
    model.unmerge_adapter()
    assert digest(model) == original


@pytest.mark.parametrize("together", [True, False], ids=["at-once", "one-after-the-other"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_two_adapters_merge_into_the_sum_of_their_changes(dtype, together):
    model, layer = two_adapters(dtype)
    before, names = digest(model), ("default", "second")
    reference = merged_reference(layer, names)
    bound = merged_bound(layer, reference, names)  # one rounding to bf16 even when merged one after the other
    if together:
        model.merge_adapter(list(names))
    else:
        for name in names:
            model.merge_adapter([name])
    assert layer.merged_adapters == list(names)
    assert ((layer.base_matrix().detach().double() - reference).abs() <= bound).all()
    model.unmerge_adapter()
    assert digest(model) == before


def test_merging_twice_merges_once_and_says_so():
    model = adapt(make_base())
    perturb(model)
    model.merge_adapter()
    once = digest(model)
    with pytest.warns(UserWarning, match="All adapters are already merged, nothing to do"):
        model.merge_adapter()
    assert digest(model) == once


def test_unmerging_what_is_not_merged_warns_and_changes_nothing():
    model = adapt(make_base())
    before = digest(model)
    with pytest.warns(UserWarning, match="Already unmerged. Nothing to do."):
        model.unmerge_adapter()
    assert digest(model) == before


def test_merging_an_untrained_adapter_changes_no_bit():
    for dtype in DTYPES:
        model = adapt(make_base(dtype=dtype))
        before = digest(model)
        model.merge_adapter()
        assert digest(model) == before


def test_a_float64_base_keeps_its_digits_when_merged():
    base = make_base(dtype=torch.float64)
    with torch.no_grad():
        base.proj.weight.div_(3)
    before = base.proj.weight.detach().clone()
    model = adapt(base)
    model.merge_adapter()
    assert torch.equal(only_layer(model).get_base_layer().weight, before)


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_cast_while_merged_is_the_cast_base_when_unmerged(kind):
    model = adapt(make_base(kind))
    before = only_layer(model).get_base_layer().weight.detach().clone()
    perturb(model)
    model.merge_adapter()
    model.to(torch.bfloat16)
    model.unmerge_adapter()
    assert torch.equal(only_layer(model).get_base_layer().weight, before.bfloat16())
    assert model(inputs(24, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_a_tied_model_cast_while_merged_stays_tied():
    base = tiny_llama()
    base.config.tie_word_embeddings = True
    base.tie_weights()
    model = adapt(base, target_modules=["embed_tokens"], ensure_weight_tying=True)
    perturb(model)
    model.merge_adapter()
    model.to(torch.bfloat16)
    model.unmerge_adapter()
    embedding, head = (
        module.get_base_layer() for module in (base.get_input_embeddings(), base.get_output_embeddings())
    )
    assert head.weight is embedding.weight


def test_a_merge_that_fails_while_storing_leaves_nothing_merged(monkeypatch):
    model = adapt(make_base())
    perturb(model)
    layer, before = only_layer(model), digest(model)

    def fail(*args: object) -> None:
        raise MemoryError

    with monkeypatch.context() as patched:
        patched.setattr(layer, "as_stored", fail)
        with pytest.raises(MemoryError):
            model.merge_adapter()
    assert not layer.merged
    assert digest(model) == before
    with torch.no_grad():
        layer.get_base_layer().weight = nn.Parameter(layer.get_base_layer().weight * 2, requires_grad=False)
    doubled = layer.get_base_layer().weight
    model.merge_adapter()
    model.unmerge_adapter()
    assert layer.get_base_layer().weight is doubled  # not what an abandoned merge had kept


def test_get_delta_weight_is_the_change_in_the_shape_of_the_weight():
    for kind in KINDS:
        model = adapt(make_base(kind, (40, 16)))
        perturb(model)
        layer = only_layer(model)
        delta = layer.get_delta_weight("default")
        assert delta.shape == layer.get_base_layer().weight.shape
        assert delta.dtype == torch.float32
        W = layer.base_matrix().detach().double()
        matrix = delta.T if kind == "conv1d" else delta
        bound = merged_bound(layer, torch.zeros_like(W)) - 2 * U32 * W.abs()
        # the reference itself cancels W: float64 roundings of it, far below
        error = (matrix.detach().double() - (merged_reference(layer) - W)).abs()
        assert (error <= bound + 8 * 2.0**-53 * (W.abs() + 1)).all()


def test_get_delta_weight_does_not_depend_on_being_merged():
    model = adapt(make_base())
    perturb(model)
    layer = only_layer(model)
    before = layer.get_delta_weight("default")
    model.merge_adapter()
    assert torch.equal(layer.get_delta_weight("default"), before)


def test_the_change_is_additive_so_that_peft_may_convert_it_to_lora():
    layer = only_layer(adapt(make_base()))
    assert layer.supports_lora_conversion()
