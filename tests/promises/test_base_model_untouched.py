"""The base model is whole again, bit for bit, whatever was merged, trained, deleted or unloaded."""

from __future__ import annotations

import contextlib
import hashlib
import warnings

import pytest
import torch
from builders.adapters import assert_same_tensors, perturb, snapshot
from builders.llama import tiny_llama
from builders.one_layer import adapt, inputs, make_base, only_layer
from builders.references import forward_bound, paper_forward
from peft import get_peft_model
from torch import nn

from sorsa_plugin import SORSAConfig, gaps
from sorsa_plugin.layers.layer import sorsa_layers

DTYPES = [torch.float32, torch.bfloat16]


def digest(module: nn.Module) -> str:
    """SHA-256 of every base weight and bias of a model with SORSA layers."""
    found = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        if "sorsa_" not in name:
            found.update(name.encode() + tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


pytestmark = pytest.mark.filterwarnings("ignore:Already following adapters were merged:UserWarning")


def two_adapters(dtype=torch.float32, shape=(40, 16)):
    model = adapt(make_base("linear", shape, dtype), r=4)
    model.add_adapter("second", SORSAConfig(r=2, target_modules=["proj"]))
    perturb(model, seed=1)
    perturb(model, "second", seed=2)
    return model, only_layer(model)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_twenty_one_merge_cycles_leave_the_base_weight_bit_equal(kind, dtype):
    model, x = adapt(make_base(kind, (40, 16), dtype)), inputs(16, dtype=dtype)
    perturb(model)
    before, output = digest(model), model(x).detach()
    for cycle in range(21):
        model.merge_adapter(safe_merge=bool(cycle % 2))
        assert digest(model) != before
        model.unmerge_adapter()
        assert digest(model) == before, cycle
    assert torch.equal(model(x), output)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_language_model_is_whole_again_after_merging_training_and_unloading(dtype, tokens):
    base = tiny_llama(dtype)
    before = snapshot(base)
    model = get_peft_model(base, SORSAConfig(r=3, target_modules="all-linear", gamma=0.0))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    for _ in range(2):
        model(tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():  # what GRPO with vLLM does at every step
            model.merge_adapter()
            model.unmerge_adapter()
    model.merge_adapter()
    model.unmerge_adapter()
    assert_same_tensors(snapshot(model.unload()), before)


def test_disabling_a_merged_adapter_gives_the_base_model_back():
    base, x = make_base(), inputs(24)
    expected = base(x)
    model = adapt(base)
    perturb(model)
    output, before = model(x).detach(), digest(model)
    model.merge_adapter()
    with model.disable_adapter():
        assert torch.equal(model(x), expected)
        assert digest(model) == before
    assert torch.equal(model(x), output)


@pytest.mark.parametrize("merged", [["default"], ["default", "second"], ["second", "default"]], ids="-then-".join)
def test_an_adapter_deleted_while_merged_takes_its_change_with_it(merged):
    model, layer = two_adapters()
    original = digest(model)
    layer.merge(adapter_names=["second"])
    only_second = digest(model)
    layer.unmerge()
    layer.merge(adapter_names=merged)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # PEFT says which adapter is active now
        layer.delete_adapter("default")
    assert digest(model) == (only_second if "second" in merged else original)
    if not layer.merged:
        layer.merge(adapter_names=["second"])
    assert digest(model) == only_second
    layer.unmerge()
    assert digest(model) == original
    x = inputs(16)
    error = (layer(x).detach().double() - paper_forward(layer, x, "second")).abs()
    assert (error <= forward_bound(layer, x, ("second",))).all()


@pytest.mark.filterwarnings("ignore:Adapter default was active which is now deleted:UserWarning")
def test_deleting_a_merged_adapter_from_a_model_is_refused_by_peft_or_undoes_the_merge():
    model, layer = two_adapters()
    original = digest(model)
    model.merge_adapter(["default"])
    with contextlib.suppress(ValueError):  # peft >= 0.21: "Cannot delete adapter(s) ... while they are merged"
        model.delete_adapter("default")
    assert layer.merged == ("default" in layer.sorsa_factors)
    if layer.merged:
        model.unmerge_adapter()
    assert digest(model) == original


@pytest.mark.parametrize("merged_first", [False, True])
def test_unload_returns_the_untouched_base_model(merged_first):
    base = make_base("linear", (40, 16), torch.bfloat16)
    before = snapshot(base)
    model = adapt(base)
    perturb(model)
    if merged_first:
        model.merge_adapter()
        model.unmerge_adapter()
    unloaded = model.unload()
    assert type(unloaded.proj) is nn.Linear
    assert_same_tensors(snapshot(unloaded), before)


def test_merging_a_layer_leaves_a_module_that_shares_its_weight_as_it_is(tokens):
    base = tiny_llama()
    base.model.layers[1].mlp.up_proj.weight = base.model.layers[0].mlp.up_proj.weight
    model = get_peft_model(base, SORSAConfig(r=3, target_modules=r".*layers\.0\.mlp\.up_proj"))
    perturb(model)
    layer = sorsa_layers(model)[0]
    before, logits = digest(model), model(tokens).logits
    shared = model.base_model.model.model.layers[1].mlp.up_proj.weight
    untouched = shared.clone()
    model.merge_adapter()
    assert torch.equal(model.base_model.model.model.layers[1].mlp.up_proj.weight, untouched)
    torch.testing.assert_close(model(tokens).logits, logits, rtol=0, atol=1e-6)  # |logits| < 1: a few roundings
    model.unmerge_adapter()
    assert digest(model) == before
    assert layer.get_base_layer().weight is shared


def test_training_folded_leaves_the_base_as_it_was(tokens: torch.Tensor) -> None:
    base = tiny_llama()
    before = snapshot(base)
    model = get_peft_model(base, SORSAConfig(r=4, target_modules="all-linear", gamma=0.1)).train()
    perturb(model, scale=0.3)
    model.fold()
    start, loss = gaps(model), model(tokens, labels=tokens).loss.item()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for _ in range(5):
        optimizer.zero_grad()
        model(tokens, labels=tokens).loss.backward()
        optimizer.step()
    assert model(tokens, labels=tokens).loss.item() < loss
    assert all(gap < start[name] for name, gap in gaps(model).items())
    assert_same_tensors(snapshot(model.unload()), before)


def config(**options) -> SORSAConfig:
    return SORSAConfig(**{"r": 3, "target_modules": "all-linear", **options})


def test_wrapping_and_unloading_leaves_the_base_model_bit_equal_and_unwrapped():
    base = tiny_llama()
    before = snapshot(base)
    types = [type(module) for module in base.modules()]
    unloaded = get_peft_model(base, config()).unload()
    assert unloaded is base
    assert [type(module) for module in base.modules()] == types
    assert_same_tensors(snapshot(base), before)


def test_training_lowers_the_loss_and_the_base_is_untouched(tokens):
    base = tiny_llama()
    before = snapshot(base)
    model = get_peft_model(base, config()).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3, weight_decay=0.0)
    losses = []
    for _ in range(12):
        loss = model(tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    assert_same_tensors(snapshot(model.unload()), before)
