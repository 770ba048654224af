"""Neither autocast nor a cast of the whole model rounds what has to stay fp32."""

from __future__ import annotations

import pytest
import torch
from builders.adapters import perturb
from builders.llama import tiny_llama
from peft import PeftModel, get_peft_model

from sorsa_plugin import SORSAConfig, attach, factorise, gaps, orthonormality
from sorsa_plugin.errors import RankError, SORSAConfigError
from sorsa_plugin.files.adapter_format import FROZEN, OFFSETS
from sorsa_plugin.layers.layer import sorsa_layers
from sorsa_plugin.linalg.fingerprint import fingerprint
from sorsa_plugin.linalg.orthonormality import floor
from sorsa_plugin.linalg.precision import full_precision


def wrapped(**options) -> PeftModel:
    return get_peft_model(tiny_llama(), SORSAConfig(r=4, target_modules="all-linear", **options))


@pytest.mark.parametrize("cast", [lambda m: m.to(torch.bfloat16), lambda m: m.half(), lambda m: m.bfloat16()])
def test_casting_the_model_leaves_factors_fp32_and_the_saved_adapter_loads_on_its_base(cast, tmp_path, tokens):
    model = cast(wrapped())
    tensors = [getattr(layer.factors("default"), n) for layer in sorsa_layers(model) for n in (*OFFSETS, *FROZEN)]
    assert {tensor.dtype for tensor in tensors} == {torch.float32}
    perturb(model)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(cast(tiny_llama()), tmp_path)
    assert torch.equal(loaded(tokens).logits, model(tokens).logits)


def test_a_float64_model_computes_in_float64():
    model = wrapped().double()
    assert sorsa_layers(model)[0].factors("default").U0.dtype == torch.float64


def test_gaps_and_loss_are_the_same_inside_autocast():
    model = wrapped()
    outside = gaps(model), float(orthonormality(model).detach())
    with torch.autocast("cpu", torch.bfloat16):
        inside = gaps(model), float(orthonormality(model).detach())
    assert inside == outside
    assert max(outside[0].values()) < floor(4)  # bf16 would read 1e-3


def test_factors_fingerprints_and_merges_are_the_same_inside_autocast(tmp_path):
    model = wrapped()
    perturb(model)
    model.save_pretrained(tmp_path)
    weight = torch.randn(40, 30, generator=torch.Generator().manual_seed(1))
    delta, triplets = sorsa_layers(model)[0].get_delta_weight("default"), factorise(weight, 3, svd="randomized")
    with torch.autocast("cpu", torch.bfloat16):
        PeftModel.from_pretrained(tiny_llama(), tmp_path)  # a rounded fingerprint would refuse its own base
        assert torch.equal(sorsa_layers(model)[0].get_delta_weight("default"), delta)
        assert all(map(torch.equal, factorise(weight, 3, svd="randomized"), triplets))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_default_dtype_and_device_have_no_say_in_an_adapter(dtype):
    weight = torch.randn(40, 30, generator=torch.Generator().manual_seed(1))
    expected = [*factorise(weight, 3, svd="randomized"), fingerprint(weight)]
    previous = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta"):
            found = [*factorise(weight, 3, svd="randomized"), fingerprint(weight)]
    finally:
        torch.set_default_dtype(previous)
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("inherited", [True, False])
@pytest.mark.parametrize("asked", ["tf32", "ieee"])
def test_tf32_is_off_inside_and_afterwards_as_it_was(asked, inherited, monkeypatch):
    """The settings exist without a GPU, which is only asked for."""
    backends, matmul = torch.backends, torch.backends.cuda.matmul
    before = backends.fp32_precision, matmul.fp32_precision
    try:
        (backends if inherited else matmul).fp32_precision = asked
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        with full_precision():
            assert matmul.fp32_precision == "ieee"
        assert matmul.fp32_precision == asked
        if inherited:
            backends.fp32_precision = "ieee" if asked == "tf32" else "tf32"
            assert matmul.fp32_precision == backends.fp32_precision
    finally:
        backends.fp32_precision, matmul.fp32_precision = before


@pytest.mark.parametrize("update", ["coupled", "decoupled"])
def test_a_step_inside_autocast_is_the_step_outside(update, tokens):
    results = []
    for inside in (False, True):
        model = wrapped(reg_update=update)
        perturb(model)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)
        attach(model, optimizer)
        model(tokens, labels=tokens).loss.backward()
        with torch.autocast("cpu", torch.bfloat16, enabled=inside):
            optimizer.step()
        results.append([parameter.detach().clone() for parameter in model.parameters() if parameter.requires_grad])
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize(
    ("rank", "svd", "error", "message"),
    [
        (0, "exact", RankError, "rank of here is 0; expected an integer >= 1"),
        (-1, "auto", RankError, "rank of here is -1"),
        (2, "exakt", SORSAConfigError, "svd is 'exakt'; expected one of 'auto', 'exact', 'randomized'"),
    ],
)
def test_factorise_refuses_what_it_cannot_honour(rank, svd, error, message):
    with pytest.raises(error, match=message):
        factorise(torch.randn(6, 5), rank, svd=svd, name="here")


def test_a_learning_rate_raised_by_hand_becomes_the_peak_and_is_said_once(tokens, caplog):
    model = wrapped()
    perturb(model)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-6)
    attachment = attach(model, optimizer)
    for rate in (1e-6, 5e-5, 1e-4, 5e-5):
        optimizer.param_groups[0]["lr"] = rate
        model(tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert optimizer.param_groups[0]["sorsa_eta_max"] == 1e-4
    assert attachment.metrics(optimizer)["sorsa/gamma"] == pytest.approx(4e-4 / 2)
    assert caplog.text.count("rose above the peak") == 1
