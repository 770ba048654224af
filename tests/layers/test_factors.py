"""One adapter's tensors: offsets from frozen factors, the low-rank pair, what trains and what never does."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from builders.adapters import perturb
from builders.one_layer import SHAPES, adapt, make_base, only_layer
from hypothesis import given, settings
from hypothesis import strategies as st

from sorsa_plugin import factorise
from sorsa_plugin.files.adapter_format import FROZEN, OFFSETS
from sorsa_plugin.layers.factors import SORSAFactors
from sorsa_plugin.layers.frozen_placement import launched_on_many

U32 = 2.0**-24


def make_factors(shape=(24, 16), rank=4, scale=0.1, seed=0) -> SORSAFactors:
    """Factors of a random weight, moved by about `scale` relative."""
    generator = torch.Generator().manual_seed(seed)
    W = torch.randn(shape, generator=generator) * shape[1] ** -0.5
    factors = SORSAFactors(*shape, rank, "cpu")
    factors.set_initial(factorise(W, rank), W.sum(1))
    with torch.no_grad():
        for name in OFFSETS:
            offset = getattr(factors, name)
            offset.copy_(torch.randn(offset.shape, generator=generator) * offset.shape[0] ** -0.5 * scale)
    return factors


def test_new_factors_are_all_there_in_fp32_and_only_the_offsets_are_parameters():
    factors = SORSAFactors(24, 16, 4, "cpu")
    assert {name: tuple(tensor.shape) for name, tensor in factors.state_dict().items()} == {
        "dU": (24, 4), "dS": (4,), "dV": (16, 4), "U0": (24, 4), "S0": (4,), "V0": (16, 4), "fingerprint": (24,),
    }  # fmt: skip
    assert {tensor.dtype for tensor in factors.state_dict().values()} == {torch.float32}
    assert tuple(name for name, _ in factors.named_parameters()) == OFFSETS
    assert tuple(name for name, _ in factors.named_buffers()) == FROZEN
    assert factors.rank == 4


@settings(max_examples=25, deadline=None)
@given(
    out=st.integers(1, 24),
    inner=st.integers(1, 24),
    share=st.floats(0, 1),
    scale=st.floats(0, 1),
    seed=st.integers(0, 99),
)
def test_the_pair_is_the_difference_of_the_two_products_without_their_cancellation(out, inner, share, scale, seed):
    rank = max(1, int(share * min(out, inner)))
    factors = make_factors((out, inner), rank, scale, seed)
    L, R = (part.detach() for part in factors.low_rank_pair())
    assert (L.shape, R.shape) == ((out, 2 * rank), (inner, 2 * rank))
    U0, S0, V0, dU, dS, dV = (getattr(factors, name).detach().double() for name in ("U0", "S0", "V0", "dU", "dS", "dV"))
    U, S, V = U0 + dU, S0 + dS, V0 + dV
    expected = (U * S) @ V.T - (U0 * S0) @ V0.T
    found = L.double() @ R.double().T
    # four roundings relative to the size of the pair's own products, which shrink with the change
    bound = L.double().abs() @ R.double().abs().T
    parts = (dU.abs() * S.abs()) @ V.abs().T + U0.abs() @ (V0.abs() * dS.abs() + dV.abs() * S.abs()).T
    assert ((found - expected).abs() <= 5 * U32 * (bound + parts) + 1e-15 * (S0.max() + 1)).all()


def test_the_pair_of_untrained_factors_multiplies_to_exactly_zero():
    factors = make_factors(scale=0.0)
    L, R = factors.low_rank_pair()
    assert torch.equal(L @ R.T, torch.zeros(24, 16))
    x = torch.randn(5, 16)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert torch.equal((x.to(dtype) @ R.to(dtype)) @ L.to(dtype).T, torch.zeros(5, 24, dtype=dtype))


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("rank", [1, 16])
def test_set_factors_makes_them_the_current_ones_up_to_one_rounding(shape, rank):
    layer = only_layer(adapt(make_base(shape=shape), r=rank))
    generator = torch.Generator().manual_seed(1)
    wanted = [torch.randn(part.shape, generator=generator) for part in layer.get_factors()]
    layer.set_factors("default", *wanted)
    frozen = layer.factors("default")
    for found, target, initial in zip(layer.get_factors(), wanted, (frozen.U0, frozen.S0, frozen.V0), strict=True):
        # the offset is rounded once, the sum once more
        assert ((found - target).abs() <= 2 * U32 * (target.abs() + initial.abs())).all()


def test_setting_the_initial_factors_gives_the_base_model_back_exactly():
    base = make_base()
    x = torch.randn(3, 24)
    expected = base(x)
    model = adapt(base)
    layer = only_layer(model)
    initial = [part.detach().clone() for part in layer.get_factors()]
    perturb(model)
    assert not torch.equal(model(x), expected)
    layer.set_factors("default", *initial)
    assert torch.equal(model(x), expected)


def test_get_factors_is_differentiable_with_respect_to_the_offsets_alone():
    model = adapt(make_base())
    layer = only_layer(model)
    U, S, V = layer.get_factors()
    weights = [torch.randn_like(part) for part in (U, S, V)]
    sum((part * weight).sum() for part, weight in zip((U, S, V), weights, strict=True)).backward()
    factors = layer.factors("default")
    for name, weight in zip(OFFSETS, weights, strict=True):
        assert torch.equal(getattr(factors, name).grad, weight)
    assert all(getattr(factors, name).grad is None for name in FROZEN)


@pytest.mark.parametrize("wrong", ["U", "S", "V"])
def test_factors_of_another_shape_are_refused_by_name_and_change_nothing(wrong):
    model = adapt(make_base(shape=(24, 16)))
    perturb(model)
    layer = only_layer(model)
    before = {name: tensor.clone() for name, tensor in layer.factors("default").state_dict().items()}
    parts = {name: part.detach() * 2 for name, part in zip("USV", layer.get_factors(), strict=True)}
    parts[wrong] = parts[wrong][:-1]
    with pytest.raises(ValueError, match=rf"{wrong} has shape \(.*expected \("):
        layer.set_factors("default", *parts.values())
    after = layer.factors("default").state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_an_unknown_adapter_is_an_error_that_lists_the_known_ones():
    layer = only_layer(adapt(make_base()))
    with pytest.raises(ValueError, match=r"no SORSA adapter named 'other'; it has: default"):
        layer.get_factors("other")


# -- frozen means frozen ---------------------------------------------------------------------------------------------


@pytest.fixture(params=["buffers", "parameters"])
def frozen_as(request, monkeypatch) -> str:
    """Both homes of the frozen factors; a launcher that announces several processes makes them parameters."""
    for name in ("WORLD_SIZE", "ACCELERATE_USE_FSDP"):
        monkeypatch.delenv(name, raising=False)
    if request.param == "parameters":
        monkeypatch.setenv("WORLD_SIZE", "2")
    return request.param


@pytest.mark.parametrize(
    ("environment", "many"),
    [
        ({}, False),
        ({"WORLD_SIZE": "1"}, False),
        ({"WORLD_SIZE": "2"}, True),
        ({"ACCELERATE_USE_FSDP": "true"}, True),
        ({"ACCELERATE_USE_FSDP": "True", "WORLD_SIZE": "1"}, True),
        ({"ACCELERATE_USE_FSDP": "false"}, False),
    ],
    ids=str,
)
def test_the_environment_decides_where_the_frozen_factors_live(environment, many, monkeypatch):
    for name in ("WORLD_SIZE", "ACCELERATE_USE_FSDP"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert launched_on_many() is many
    factors = only_layer(adapt(make_base(), r=2)).factors("default")
    home = dict(factors.named_parameters() if many else factors.named_buffers())
    assert set(FROZEN) <= set(home)
    assert not any(home[name].requires_grad for name in FROZEN)


def test_the_state_dict_has_the_same_keys_wherever_the_frozen_factors_live(frozen_as):
    factors = SORSAFactors(6, 5, 2, "cpu")
    assert set(factors.state_dict()) == {*OFFSETS, *FROZEN}


def test_no_sweep_over_the_adapter_ever_trains_the_frozen_factors(frozen_as):
    model = adapt(make_base(), r=3)
    model.add_adapter("second", adapt(make_base(), r=2).peft_config["default"])
    layer = only_layer(model)

    def assert_frozen(trained: set[str]) -> None:
        for adapter in ("default", "second"):
            factors = layer.factors(adapter)
            assert not any(getattr(factors, name).requires_grad for name in FROZEN)
            assert {getattr(factors, name).requires_grad for name in OFFSETS} == {adapter in trained}

    assert_frozen({"default"})
    model.set_adapter("second")
    assert_frozen({"second"})
    layer.set_adapter(["default", "second"])
    assert_frozen({"default", "second"})
    layer.set_adapter("default", inference_mode=True)
    assert_frozen(set())
    model.set_requires_grad(["default", "second"], True)
    assert_frozen({"default", "second"})
    model.set_requires_grad("second", False)
    assert_frozen({"default"})
    layer.enable_adapters(False)
    assert_frozen(set())
    layer.enable_adapters(True)
    assert_frozen({"default"})
    with model.disable_adapter():
        assert_frozen(set())
    assert_frozen({"default"})


def flag_all(model) -> None:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("sorsa_" in name)
        parameter.requires_grad = "sorsa_" in name
    model.requires_grad_(True)


def offsets_of(model) -> set[str]:
    return {name for name, _ in model.named_parameters() if name.rsplit(".", 1)[1] in OFFSETS}


CHANGES = {
    "made": lambda model: model,
    "copied": copy.deepcopy,
    "pickled": lambda model: pickle.loads(pickle.dumps(model)),
    "moved": lambda model: model.double(),
    "emptied": lambda model: model.to("meta").to_empty(device="cpu"),
    "assigned": lambda model: (model.load_state_dict(model.state_dict(), assign=True), model)[1],
}


@pytest.mark.parametrize("change", CHANGES)
def test_no_sweep_over_the_models_flags_ever_trains_the_frozen_factors(frozen_as, change):
    model = CHANGES[change](adapt(make_base(), r=3))
    flag_all(model)
    adapters = {name for name, p in model.named_parameters() if p.requires_grad and "sorsa_" in name}
    assert adapters == offsets_of(model)
    model(torch.randn(4, 24).to(next(model.parameters()))).sum().backward()
    assert {name for name, p in model.named_parameters() if p.grad is not None and "sorsa_" in name} == adapters


def test_a_parameter_of_an_engines_own_gets_no_gradient_whatever_its_flag(frozen_as):
    factors = only_layer(adapt(make_base(), r=3)).factors("default")
    for name in FROZEN:
        tensor = getattr(factors, name)
        delattr(factors, name)
        factors.register_parameter(name, torch.nn.Parameter(tensor.detach(), requires_grad=True))  # as fully_shard does
    L, R = factors.low_rank_pair()
    (L.sum() + R.sum()).backward()
    assert all(getattr(factors, name).grad is None for name in FROZEN)
    assert all(getattr(factors, name).grad is not None for name in OFFSETS)


def test_peft_reports_the_flags_of_the_offsets(frozen_as):
    model = adapt(make_base(), r=3)
    assert model.get_model_status().requires_grad == {"default": True}
    model.set_requires_grad("default", False)
    assert model.get_model_status().requires_grad == {"default": False}


@pytest.mark.parametrize("change", CHANGES)
def test_buffers_are_those_that_activation_offloading_leaves_where_they_are(change):
    model = CHANGES[change](adapt(make_base(), r=3))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        model(torch.randn(4, 24).to(next(model.parameters())))
    factors = only_layer(model).factors("default")
    kept = {id(factors.U0), id(factors.S0), id(factors.V0)}
    assert kept <= {id(tensor) for tensor in saved}
    assert all(isinstance(tensor, torch.nn.Buffer) for tensor in saved if id(tensor) in kept)
    assert set(dict(factors.named_buffers())) == set(FROZEN)


def test_what_was_frozen_by_hand_stays_frozen_when_adapters_are_enabled_again(frozen_as):
    model = adapt(make_base(), r=3)
    layer = only_layer(model)
    factors = layer.factors("default")
    factors.dV.requires_grad_(False)
    for _ in range(2):
        with model.disable_adapter():
            with model.disable_adapter():
                assert not any(offset.requires_grad for offset in factors.parameters())
            layer.enable_adapters(False)
    assert [offset.requires_grad for offset in factors.parameters()] == [True, True, False]
    model.set_requires_grad("default", False)
    with model.disable_adapter():
        pass
    assert not any(offset.requires_grad for offset in factors.parameters())
    with model.disable_adapter():
        model.set_adapter("default")
    assert all(offset.requires_grad for offset in factors.parameters()), "what is activated trains"


def test_a_training_step_moves_the_offsets_and_not_the_frozen_factors(frozen_as):
    model = adapt(make_base(), r=3, gamma=0.0)
    factors = only_layer(model).factors("default")
    before = {name: tensor.clone() for name, tensor in factors.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(torch.randn(4, 24)).square().sum().backward()
    optimizer.step()
    after = factors.state_dict()
    assert {name for name, tensor in before.items() if not torch.equal(after[name], tensor)} == set(OFFSETS)


def test_parameters_and_buffers_compute_and_save_the_same(monkeypatch):
    models = []
    for size in ("1", "2"):
        monkeypatch.setenv("WORLD_SIZE", size)
        models.append(adapt(make_base(), r=3))
        perturb(models[-1])
    x = torch.randn(4, 24)
    assert torch.equal(models[0](x), models[1](x))
    first, second = (model.state_dict() for model in models)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


# -- precision -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounded_offsets_are_restored_in_place_with_their_gradients(dtype):
    factors = make_factors()
    parameters = [factors.get_parameter(name) for name in OFFSETS]
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    assert factors.restore_fp32() == []
    factors.cast_offsets(dtype)
    assert {p.dtype for p in parameters} == {p.grad.dtype for p in parameters} == {dtype}
    assert factors.U0.dtype == torch.float32
    restored = factors.restore_fp32()
    assert [id(p) for p in restored] == [id(p) for p in parameters]
    assert {p.dtype for p in parameters} == {p.grad.dtype for p in parameters} == {torch.float32}


def test_what_a_file_holds_is_not_rounded_into_offsets_that_train():
    saved = make_factors(seed=1).state_dict()
    factors = make_factors()
    parameters = [factors.get_parameter(name) for name in OFFSETS]
    factors.cast_offsets(torch.bfloat16)
    factors.load_state_dict(saved)
    assert all(torch.equal(tensor, saved[name]) for name, tensor in factors.state_dict().items())
    assert [id(factors.get_parameter(name)) for name in OFFSETS] == [id(p) for p in parameters]


@pytest.mark.parametrize("why", ["frozen", "engine"])
def test_16_bit_offsets_of_inference_and_of_engines_keep_their_dtype_and_memory_on_loading(why):
    factors = make_factors()
    factors.cast_offsets(torch.bfloat16)
    parameters = [factors.get_parameter(name) for name in OFFSETS]
    if why == "frozen":
        factors.requires_grad_(False)
    else:  # DeepSpeed's parameters are views of one flat tensor that it steps
        flat = torch.cat([p.data.reshape(-1) for p in parameters])
        for parameter, part in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
            parameter.data = part.view_as(parameter)
    memory = [p.data_ptr() for p in parameters]
    saved = make_factors(seed=1).state_dict()
    factors.load_state_dict(saved)
    assert [p.data_ptr() for p in parameters] == memory
    assert all(torch.equal(getattr(factors, name), saved[name].bfloat16()) for name in OFFSETS)


def test_random_factors_are_orthonormal_and_their_change_is_of_the_size_of_the_weight():
    torch.manual_seed(0)
    factors = SORSAFactors(24, 16, 4, "cpu")
    factors.randomise()
    for P in (factors.U0, factors.V0):
        assert (P.T @ P - torch.eye(4)).norm() <= 1e-5 * 2
    L, R = (part.detach() for part in factors.low_rank_pair())
    assert 0.1 < float((L @ R.T).norm()) < 100
