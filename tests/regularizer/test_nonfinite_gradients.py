"""A gradient that holds NaN or infinity is named before the step, with the layers that it came from."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from builders.llama import tiny_llama
from peft import PeftModel, get_peft_model
from torch.optim import SGD, AdamW

from sorsa_plugin import SORSAConfig, attach
from sorsa_plugin.errors import NonFiniteGradientError
from sorsa_plugin.layers.layer import sorsa_layers

TOKENS = torch.arange(8)[None]


def adapted(**options: object) -> PeftModel:
    torch.manual_seed(0)
    return get_peft_model(tiny_llama(), SORSAConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", **options))


def optimizer_of(model: PeftModel) -> SGD:
    return SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)


def spoil(model: PeftModel, number: int, value: float = float("nan")) -> None:
    """One number on its way back through the decoder layer of this number."""

    def hook(module, inputs, output):
        hidden = output if isinstance(output, torch.Tensor) else output[0]

        def spoilt(gradient: torch.Tensor) -> torch.Tensor:
            gradient = gradient.clone()
            gradient[0, 0, 0] = value
            return gradient

        hidden.register_hook(spoilt)

    model.get_base_model().model.layers[number].register_forward_hook(hook)


def backward(model: PeftModel) -> None:
    model(input_ids=TOKENS, labels=TOKENS).loss.backward()


@pytest.mark.parametrize("options", [{}, {"gamma": 0.0}, {"reg_update": "decoupled"}], ids=str)
@pytest.mark.parametrize("clipped", [True, False])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_the_step_is_not_taken_and_the_layers_are_named(options: dict, clipped: bool, value: float) -> None:
    model = adapted(**options)
    optimizer = optimizer_of(model)
    attach(model, optimizer)
    backward(model)
    optimizer.step()
    spoil(model, 0, value)
    optimizer.zero_grad()
    backward(model)
    if clipped:
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    inside = sum(layer.name.startswith("model.layers.0.") for layer in sorsa_layers(model))
    with pytest.raises(NonFiniteGradientError, match="optimizer step 2") as raised:
        optimizer.step()
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    total, said = len(sorsa_layers(model)), str(raised.value)
    assert f"on rank 0 in {inside} of {total} layers, the last of them model.layers.0.mlp.down_proj" in said
    if not clipped or math.isnan(value):  # clipping by a norm of infinity spreads NaN or not, as its sums happen to go
        assert f"The gradient of {3 * (total if clipped else inside)} of {3 * total} trained tensors" in said


def test_what_overflows_after_backward_is_told_apart() -> None:
    model = adapted()
    optimizer = optimizer_of(model)
    attach(model, optimizer)
    backward(model)
    sorsa_layers(model)[3].factors("default").dV.grad[0, 0] = float("inf")  # as a sum over processes might
    with pytest.raises(NonFiniteGradientError, match="finite wherever that could be asked: it overflowed later"):
        optimizer.step()


@pytest.mark.parametrize("part", ["dS", "dU", "modules_to_save"])
def test_a_bad_number_in_any_tensor_of_the_optimizer_stops_the_step(part: str) -> None:
    """Clipping by a norm of infinity makes zeros of all gradients but the bad ones."""
    model = adapted(modules_to_save=["lm_head"])
    optimizer = optimizer_of(model)
    attach(model, optimizer)
    backward(model)
    head = model.get_base_model().lm_head.modules_to_save["default"].weight
    bad = head if part == "modules_to_save" else sorsa_layers(model)[3].factors("default").get_parameter(part)
    bad.grad.view(-1)[0] = float("inf")
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    name = f"a tensor of shape {tuple(head.shape)} beside the adapters"
    name = name if bad is head else f"{sorsa_layers(model)[3].name}.default.{part[1:]}"
    count = 3 * len(sorsa_layers(model)) + 1
    with pytest.raises(NonFiniteGradientError) as raised:
        optimizer.step()
    assert f"The gradient of 1 of {count} trained tensors is not finite" in str(raised.value)
    assert f"the first of them {name}; the step was not taken" in str(raised.value)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_factors_that_overflow_the_regularizer_blame_no_batch() -> None:
    model = adapted(gamma=0.1)
    optimizer = optimizer_of(model)
    attach(model, optimizer)
    backward(model)
    sorsa_layers(model)[3].factors("default").dV.data.fill_(1e20)  # its square is above the largest fp32 number
    with pytest.raises(NonFiniteGradientError, match=r"had diverged: their largest gap was (inf|nan)") as raised:
        optimizer.step()
    assert "batch" not in str(raised.value)
    assert "last_complete_checkpoint" not in str(raised.value)


def test_a_pull_that_tears_the_factors_apart_blames_no_batch() -> None:
    """From there P <- P - gamma P E grows without bound: the gap is cubed in every step."""
    model = adapted(gamma=0.5, reg_update="decoupled")
    optimizer = optimizer_of(model)
    attach(model, optimizer)
    sorsa_layers(model)[3].factors("default").dV.data.fill_(10.0)

    def train() -> None:
        for _ in range(50):
            optimizer.zero_grad()
            backward(model)
            optimizer.step()

    with pytest.raises(NonFiniteGradientError, match="had diverged: their largest gap was") as raised:
        train()
    assert "batch" not in str(raised.value)


def test_sparse_gradients_are_looked_at() -> None:
    model = adapted()
    table = torch.nn.Embedding(4, 2, sparse=True)
    optimizer = SGD([*(p for p in model.parameters() if p.requires_grad), table.weight], lr=1e-3)
    attach(model, optimizer)
    backward(model)
    table(torch.tensor([1])).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    backward(model)
    (table(torch.tensor([1])) * float("inf")).sum().backward()
    with pytest.raises(NonFiniteGradientError, match=r"the first of them a tensor of shape \(4, 2\)"):
        optimizer.step()


def test_a_run_that_nobody_attached_is_told_once_and_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    model = adapted(gamma=0.01)
    spoil(model, 1)
    optimizer = optimizer_of(model)
    for _ in range(2):
        backward(model)
        optimizer.step()
    said = [record.getMessage() for record in caplog.records if "not finite" in record.getMessage()]
    assert len(said) == 1
    assert "optimizer step 1" in said[0]
    assert "the last of them model.layers.1.mlp.down_proj" in said[0]
    assert "the step is taken, and the factors are lost" in said[0]


def test_layers_keep_the_sum_of_their_own_gradients_over_micro_batches() -> None:
    model = adapted()
    for _ in range(3):
        backward(model)
    for layer in sorsa_layers(model):
        factors = layer.factors("default")
        kept, entries = factors.take_gradient_sum(), factors.dS.grad
        # three times r terms in another order
        torch.testing.assert_close(kept, entries.sum(), rtol=0, atol=12 * 2.0**-23 * float(entries.abs().sum()))
        assert factors.take_gradient_sum() is None


def test_a_copied_model_keeps_its_own() -> None:
    model = adapted()
    backward(model)
    twin = copy.deepcopy(model)
    for layer in (*sorsa_layers(model), *sorsa_layers(twin)):
        layer.factors("default").take_gradient_sum()
    backward(twin)
    assert all(layer.factors("default").take_gradient_sum() is None for layer in sorsa_layers(model))
    assert all(layer.factors("default").take_gradient_sum() is not None for layer in sorsa_layers(twin))


def test_a_step_that_loss_scaling_leaves_out_is_no_error() -> None:
    model = adapted()
    optimizer = AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    attachment = attach(model, optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)
    for _ in range(40):
        optimizer.zero_grad()
        scaler.scale(model(input_ids=TOKENS, labels=TOKENS).loss).backward()
        scaler.step(optimizer)
        scaler.update()
    assert 0 < attachment.steps < 40
