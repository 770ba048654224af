"""The regularizer's formulas: gaps, loss and closed-form gradient, against float64 autograd and finite differences."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from builders.adapters import perturb
from builders.llama import tiny_llama
from builders.references import ROUNDOFF
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel, get_peft_model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from sorsa_plugin import SORSAConfig, attach, gaps, orthonormality
from sorsa_plugin.layers.layer import sorsa_layers
from sorsa_plugin.regularizer.engines import Share, WholeFactors
from sorsa_plugin.regularizer.gaps import all_gaps, deviations
from sorsa_plugin.regularizer.trained_factors import Factor, model_factors

RANK = 4
FACTORS = 2 * 7 * 2  # two decoder layers, seven projections, U and V


def eps(rank: int) -> float:
    """The orthonormality that the initialisation promises."""
    return 1e-5 * rank**0.5


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


def exact_factors(model: PeftModel, adapter: str = "default") -> dict[str, torch.Tensor]:
    """Float64 leaves U and V of every layer, by the names that `gaps` gives them."""
    found = {}
    for layer in sorsa_layers(model):
        tensors = layer.factors(adapter)
        for part in "UV":
            P = tensors.get_buffer(f"{part}0").double() + tensors.get_parameter(f"d{part}").detach().double()
            found[f"{layer.name}.{adapter}.{part}"] = P.requires_grad_()
    return found


def exact_gap(P: torch.Tensor) -> torch.Tensor:
    return torch.linalg.matrix_norm(P.mT @ P - torch.eye(P.shape[1], dtype=P.dtype))


def whole_shares(factors: list[Factor]) -> list[Share]:
    return WholeFactors(None).shares(factors)


def exact_gaps(model: PeftModel) -> dict[str, float]:
    return {name: float(exact_gap(P.detach())) for name, P in exact_factors(model).items()}


def exact_gradients(model: PeftModel) -> dict[str, torch.Tensor]:
    """dL_reg/dP by float64 autograd of the definition, mean ||P^T P - I||_F."""
    leaves = exact_factors(model)
    torch.stack([exact_gap(P) for P in leaves.values()]).mean().backward()
    return {name: P.grad for name, P in leaves.items()}


def package_gradients(model: PeftModel) -> dict[str, torch.Tensor]:
    model.zero_grad()
    orthonormality(model).backward()
    return {factor.name: factor.offset.grad.clone() for factor in model_factors(model)}


def rounding(P: torch.Tensor, dtype: torch.dtype) -> float:
    """Bound on the error of a gap in `dtype`: (rows + 4) u ||P||_F^2.

    The Gram matrix's inner products of `rows` terms err by at most rows u |P|^T|P| elementwise, whose norm is at most
    ||P||_F^2; forming P, subtracting I and taking the norm are a few roundings more.
    """
    u = ROUNDOFF.get(dtype, torch.finfo(dtype).eps / 2)
    return float((P.shape[0] + 4) * u * P.detach().norm() ** 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [0.0, 0.1, 1.0])
def test_gaps_and_loss_are_the_published_formula(scale: float, dtype: torch.dtype) -> None:
    model = adapted(dtype, scale)
    exact = exact_gaps(model)
    bounds = {name: rounding(P, dtype) for name, P in exact_factors(model).items()}

    found = gaps(model)

    assert list(found) == list(exact)
    assert len(found) == FACTORS
    for name, gap in exact.items():
        assert found[name] == pytest.approx(gap, rel=0, abs=bounds[name]), name
    loss = orthonormality(model).item()
    assert loss == pytest.approx(sum(exact.values()) / FACTORS, rel=0, abs=max(bounds.values()))


@pytest.mark.parametrize("scale", [1e-3, 0.1, 1.0])
def test_closed_form_gradient_is_autograd_of_the_loss(scale: float) -> None:
    """In float64 both differ by roundings of u = 1.1e-16 over at most 48 rows, divided by gaps of at least 1e-4."""
    model = adapted(torch.float64, scale)
    expected = exact_gradients(model)

    found = package_gradients(model)

    assert min(exact_gaps(model).values()) > 1e-4
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], rtol=0, atol=1e-11 / FACTORS, msg=name)


def test_fp32_gradient_is_the_exact_one_up_to_rounding() -> None:
    """P E / ||E|| changes by at most 2 delta ||P|| / ||E|| when E changes by delta; the products add rows u each."""
    model = adapted(torch.float32, 0.1)
    exact, values, expected = exact_factors(model), exact_gaps(model), exact_gradients(model)
    for name, gradient in package_gradients(model).items():
        P = exact[name].detach()
        delta = rounding(P, torch.float32) / values[name] + (RANK + 4) * ROUNDOFF[torch.float32]
        bound = 2 / FACTORS * 2 * delta * float(P.norm())
        assert float((gradient - expected[name]).norm()) <= bound, name
        assert bound < 1e-3 * float(expected[name].norm()), "the bound would let a wrong gradient pass"


@given(scale=st.floats(1e-2, 1.0), seed=st.integers(0, 10_000))
@settings(deadline=None, max_examples=10)
def test_gradient_agrees_with_central_differences(scale: float, seed: int) -> None:
    """Step h = 1e-4 of the perturbation, so that the truncation is about (h / gap)^2 and rounding u / h = 1e-10."""
    model = adapted(torch.float64)
    perturb(model, scale=scale, seed=seed)
    gradients = package_gradients(model)
    generator = torch.Generator().manual_seed(seed)
    directions = {
        factor.name: torch.randn(factor.offset.shape, generator=generator, dtype=torch.float64)
        for factor in model_factors(model)
    }
    norm = torch.stack([d.norm() for d in directions.values()]).norm()
    h = 1e-4 * scale

    def moved(step: float) -> float:
        with torch.no_grad():
            for factor in model_factors(model):
                factor.offset.add_(directions[factor.name] / norm, alpha=step)
            return orthonormality(model).item()

    up = moved(h)
    down = moved(-2 * h)
    slope = sum(float((gradients[name] * directions[name]).sum()) for name in directions) / float(norm)
    assert (up - down) / (2 * h) == pytest.approx(slope, rel=1e-6, abs=1e-8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradient_at_init_is_no_larger_than_eps_promises(dtype: torch.dtype) -> None:
    """At init gap <= eps, so that each gradient is 2/F P E / eps: at most 2/F (gap / eps) sigma_max(P), not 2/F.

    That gap is itself rounding, and another one in a product of its own.
    """
    model = adapted(dtype)
    found, values = package_gradients(model), gaps(model)
    for name, gradient in found.items():
        assert values[name] <= eps(RANK), f"{name}: initialisation breaks its promise"
        gap = values[name] + gap_rounding(len(gradient), dtype)
        promised = 2 / FACTORS * gap / eps(RANK) * 1.001  # sigma_max(P) <= sqrt(1 + eps)
        assert promised < 0.5 * 2 / FACTORS
        assert torch.isfinite(gradient).all(), name
        assert float(gradient.norm()) <= promised, name


def test_gradient_vanishes_at_exact_orthonormality() -> None:
    model = adapted(torch.float64)
    with torch.no_grad():
        for layer in sorsa_layers(model):
            U, S, V = layer.get_factors()
            layer.set_factors("default", torch.eye(*U.shape), S, torch.eye(*V.shape))
    assert max(gaps(model).values()) < 1e-15
    for name, gradient in package_gradients(model).items():
        assert torch.isfinite(gradient).all(), name
        assert float(gradient.norm()) < 1e-9, name  # roundings of 1e-16 / eps


def test_gaps_keep_the_layers_order_whatever_is_batched(monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted(torch.float64, 0.1)
    exact = exact_gaps(model)
    for elements, most in ((1, 1), (2 * 16 * RANK, 2), (2**23, 18)):  # 18 of the 28 factors have 32 rows
        monkeypatch.setattr("sorsa_plugin.regularizer.gaps.BATCH_ELEMENTS", elements)
        assert max(len(batch.shares) for batch in deviations(whole_shares(model_factors(model)))) == most
        found = gaps(model)
        assert list(found) == list(exact)
        assert all(found[name] == pytest.approx(exact[name], abs=1e-13) for name in exact)


@given(log_gap=st.floats(-12, 0), rank=st.integers(1, 8), rows=st.integers(8, 40), seed=st.integers(0, 10_000))
@settings(deadline=None, max_examples=50)
def test_gap_gradient_is_bounded_and_continuous_in_the_gap(log_gap: float, rank: int, rows: int, seed: int) -> None:
    """||2 P E / max(||E||, eps)|| <= 2 sigma_max(P) min(1, gap / eps) for a factor of any shape and gap."""
    generator = torch.Generator().manual_seed(seed)
    P = torch.linalg.qr(torch.randn(rows, rank, generator=generator, dtype=torch.float64))[0]
    P = P + 10**log_gap * torch.randn(rows, rank, generator=generator, dtype=torch.float64) / rows**0.5
    factor = Factor("P", P, torch.nn.Parameter(torch.zeros_like(P)))
    gap = float(all_gaps(whole_shares([factor])))

    from sorsa_plugin.linalg.orthonormality import _Gap

    value = _Gap.apply(factor.initial + factor.offset)
    value.backward()

    error = rounding(P, torch.float64)  # the two products may be summed in another order
    assert value.item() == pytest.approx(gap, rel=1e-12, abs=error)
    bound = 2 * float(torch.linalg.matrix_norm(P, 2)) * min(1.0, (gap + error) / eps(rank))
    assert float(factor.offset.grad.norm()) <= bound * (1 + 1e-9)


class Launches(TorchDispatchMode):
    """The operators that run in its context."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def launches_of_a_step(count: int, update: str) -> list[str]:
    base = nn.Sequential(*(nn.Linear(16, 16) for _ in range(count)))
    names = [str(i) for i in range(count)]
    model = get_peft_model(base, SORSAConfig(r=RANK, target_modules=names, reg_update=update))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    attachment = attach(model, optimizer)
    model(torch.randn(3, 16)).sum().backward()
    optimizer.step()  # the first one asks once more where each factor lives
    with Launches() as seen:
        attachment.before_step(optimizer, (optimizer,), {})
        attachment.after_step(optimizer, (optimizer,), {})
    return seen.names


@pytest.mark.parametrize("update", ["coupled", "decoupled"])
def test_a_step_launches_the_same_few_operators_for_any_number_of_layers_and_reads_one_value_back(update: str) -> None:
    few, many = launches_of_a_step(2, update), launches_of_a_step(9, update)
    assert any("bmm" in name for name in few)
    assert [name for name in few if "view" not in name] == [name for name in many if "view" not in name]
    # on the CPU the watch for NaN reads its one value at once; on a GPU when the next step begins
    assert sum("_local_scalar_dense" in name for name in many) == 1, "reading a value back waits for the device"


@pytest.mark.parametrize("at_once", [1, 2, 3])
def test_a_stack_of_factors_counts_and_is_measured_as_its_matrices(
    at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sorsa_plugin.regularizer.engines.BATCH_ELEMENTS", at_once * 7 * 2)
    generator = torch.Generator().manual_seed(0)
    initial = torch.randn(3, 7, 2, generator=generator, dtype=torch.float64)
    offset = torch.nn.Parameter(torch.randn(3, 7, 2, generator=generator, dtype=torch.float64))
    offset.grad = torch.zeros_like(offset)
    stack = Factor("experts.V", initial, offset)
    alone = [Factor(f"experts.V[{i}]", initial[i], torch.nn.Parameter(offset.detach()[i])) for i in range(3)]
    assert stack.matrices == 3
    shares = whole_shares([stack])
    assert [name for share in shares for name in share.names()] == [factor.name for factor in alone]
    assert torch.equal(all_gaps(shares), all_gaps(whole_shares(alone)))
    for batch in deviations(shares):
        batch.add_product_to([share.gradient for share in batch.shares])
    P = initial + offset.detach()
    exact = P @ (P.mT @ P - torch.eye(2, dtype=torch.float64))
    torch.testing.assert_close(offset.grad, exact, rtol=1e-13, atol=0)


def test_gaps_and_loss_of_factors_on_several_devices_are_on_the_first() -> None:
    """As `device_map` spreads a model over GPUs; the meta device stands for another one."""
    model = adapted()
    for layer in sorsa_layers(model)[:3]:
        layer.sorsa_factors.to("meta")
    assert orthonormality(model).is_meta
    gaps = all_gaps(whole_shares(model_factors(model)))
    assert gaps.is_meta
    assert gaps.shape == (FACTORS,)
