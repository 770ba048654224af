"""Which factors count in the regularizer, and by what names."""

from __future__ import annotations

import pytest
import torch
from builders.adapters import perturb
from builders.llama import tiny_llama
from builders.one_layer import adapt, inputs, make_base, only_layer
from peft import PeftModel, get_peft_model

from sorsa_plugin import SORSAConfig, attach, gaps, orthonormality
from sorsa_plugin.errors import NoAdaptedLayersError
from sorsa_plugin.layers.layer import sorsa_layers
from sorsa_plugin.regularizer.trained_factors import trainable_factors

RANK = 4
FACTORS = 2 * 7 * 2  # two decoder layers, seven projections, U and V
WIDEST = 48  # rows of the tallest factor


def gap_rounding(rows: int, dtype: torch.dtype = torch.float32) -> float:
    """How far two products P^T P of other summation order may put one gap apart: each of their r^2 entries sums `rows`
    terms, whose errors have either sign."""
    return RANK * (2.0 * rows) ** 0.5 * torch.finfo(dtype).eps


def adapted(dtype: torch.dtype = torch.float32, scale: float = 0.0, **options: object) -> PeftModel:
    """The tiny Llama with an adapter on every projection, its columns moved by about `scale`."""
    model = get_peft_model(tiny_llama(), SORSAConfig(r=RANK, target_modules="all-linear", **options)).to(dtype)
    if scale:
        perturb(model, scale=scale)
    return model


def test_gaps_are_named_by_layer_adapter_and_factor() -> None:
    names = list(gaps(adapted()))
    assert names[:2] == ["model.layers.0.self_attn.q_proj.default.U", "model.layers.0.self_attn.q_proj.default.V"]
    assert names[-1] == "model.layers.1.mlp.down_proj.default.V"


def test_loss_is_differentiable_with_respect_to_the_offsets_only() -> None:
    model = adapted(scale=0.1)
    orthonormality(model).backward()
    with_gradient = {name for name, p in model.named_parameters() if p.grad is not None}
    assert with_gradient == {
        name for name, p in model.named_parameters() if p.requires_grad and name.endswith((".dU", ".dV"))
    }
    assert len(with_gradient) == FACTORS


def two_adapters() -> PeftModel:
    model = adapted(scale=0.1)
    model.add_adapter("other", SORSAConfig(r=2, target_modules=["q_proj"]))
    perturb(model, "other", scale=0.1)  # a gap at init is rounding, and another one in a batch
    return model


def test_only_active_adapters_count() -> None:
    model = two_adapters()
    first = gaps(model)
    model.set_adapter("other")
    second = gaps(model)
    assert {name.split(".")[-2] for name in first} == {"default"}
    assert len(first) == FACTORS
    assert {name.split(".")[-2] for name in second} == {"other"}
    assert len(second) == 4  # q_proj of two layers
    assert orthonormality(model).item() == pytest.approx(sum(second.values()) / 4, abs=gap_rounding(WIDEST))


def test_every_factor_of_adapters_active_together_counts() -> None:
    model = two_adapters()
    model.base_model.set_adapter(["default", "other"])
    found = gaps(model)
    assert len(found) == FACTORS + 4
    assert orthonormality(model).item() == pytest.approx(sum(found.values()) / (FACTORS + 4), abs=gap_rounding(WIDEST))


def test_frozen_layers_do_not_count() -> None:
    model = adapted()
    for layer in sorsa_layers(model)[:3]:
        layer.factors("default").requires_grad_(False)
    assert len(gaps(model)) == FACTORS - 6


def test_disabled_adapters_do_not_count() -> None:
    model = adapted()
    with model.disable_adapter(), pytest.raises(NoAdaptedLayersError):
        gaps(model)
    assert len(gaps(model)) == FACTORS


@pytest.mark.parametrize("measure", [gaps, orthonormality])
@pytest.mark.parametrize("kind", ["plain", "inference"])
def test_nothing_to_regularize_is_an_error_that_says_what_to_do(kind: str, measure: object) -> None:
    model = tiny_llama() if kind == "plain" else adapted(inference_mode=True)
    with pytest.raises(NoAdaptedLayersError, match="no active, trainable SORSA adapter") as error:
        measure(model)
    assert type(model).__name__ in str(error.value)
    assert "get_peft_model(model, SORSAConfig(...))" in str(error.value)
    assert "is_trainable=True" in str(error.value)


@pytest.mark.parametrize(("frozen", "free"), [("dU", "dV"), ("dV", "dU")])
@pytest.mark.parametrize("update", ["coupled", "decoupled"])
def test_each_factor_trains_by_its_own_flag(frozen: str, free: str, update: str) -> None:
    """The one that trains is regularized as before; the frozen one neither moves nor counts."""
    model = adapt(make_base(), gamma=0.1, reg_update=update)
    perturb(model)
    layer = only_layer(model)
    factors = layer.factors("default")
    factors.get_parameter(frozen).requires_grad_(False)
    assert [factor.name for factor in trainable_factors([layer])] == [f"proj.default.{free[1]}"]
    before = {name: factors.get_parameter(name).detach().clone() for name in (frozen, free)}
    P = factors.get()["USV".index(free[1])].detach()
    E = P.T @ P - torch.eye(P.shape[1])
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    attach(model, optimizer)
    (0.0 * model(inputs(24)).sum()).backward()
    optimizer.step()
    # gamma/eta_max times the gradient of one gap, at rate eta_max; or gamma P E
    step = 0.1 * P @ E * (2 / E.norm() if update == "coupled" else 1.0)
    assert torch.equal(factors.get_parameter(frozen), before[frozen])
    torch.testing.assert_close(factors.get_parameter(free).detach(), before[free] - step, rtol=1e-5, atol=1e-6)
