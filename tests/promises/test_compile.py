"""torch.compile makes one graph without breaks, whose outputs and gradients are those of the eager model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from builders.llama import tiny_llama
from builders.one_layer import TwoLayers
from peft import PeftModel, get_peft_model
from torch import nn

from sorsa_plugin import SORSAConfig, attach, gaps


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def adapted(base: nn.Module, **options: Any) -> PeftModel:
    torch.manual_seed(1)
    return get_peft_model(base, SORSAConfig(r=3, init_weights=False, **options))


def step(model: Any, run: Any, *inputs: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The output of `run`, and the gradients that the sum of its squares gives the parameters of `model`."""
    model.zero_grad()
    output = run(*inputs)
    output = getattr(output, "logits", output)
    output.square().sum().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return output.detach(), gradients


def assert_compiles_to_the_same(model: PeftModel, *inputs: torch.Tensor) -> None:
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    expected, expected_gradients = step(model, model, *inputs)
    output, gradients = step(model, compiled, *inputs)
    torch.testing.assert_close(output, expected, atol=1e-5, rtol=1e-5)
    assert gradients.keys() == expected_gradients.keys()
    assert any(name.endswith("dU") for name in gradients)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected_gradients[name], atol=1e-3, rtol=1e-4, msg=name)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_linear_and_conv1d_compile_to_one_graph_that_equals_eager(training: bool) -> None:
    torch.manual_seed(0)
    model = adapted(TwoLayers(), target_modules=["linear", "conv1d"]).train(training)
    assert_compiles_to_the_same(model, torch.randn(4, 7))


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_a_llama_compiles_to_one_graph_that_equals_eager(training: bool, tokens: torch.Tensor) -> None:
    model = adapted(tiny_llama(), target_modules="all-linear", task_type="CAUSAL_LM").train(training)
    assert_compiles_to_the_same(model, tokens)


def test_two_active_adapters_compile() -> None:
    torch.manual_seed(0)
    model = adapted(TwoLayers(), target_modules=["linear", "conv1d"])
    model.add_adapter("second", SORSAConfig(r=2, target_modules=["linear"], init_weights=False))
    model.base_model.set_adapter(["default", "second"])
    assert_compiles_to_the_same(model, torch.randn(4, 7))


def test_an_adapter_from_a_file_compiles(tmp_path: Path, tokens: torch.Tensor) -> None:
    adapted(tiny_llama(), target_modules="all-linear", task_type="CAUSAL_LM").save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(tiny_llama(), tmp_path, is_trainable=True)
    assert_compiles_to_the_same(model, tokens)


@torch.no_grad()
def test_a_compiled_model_follows_disabled_and_merged_adapters() -> None:
    torch.manual_seed(0)
    model = adapted(TwoLayers(), target_modules=["linear", "conv1d"]).eval()
    compiled, x = torch.compile(model, fullgraph=True, backend="eager"), torch.randn(4, 7)
    changed = compiled(x)
    torch.testing.assert_close(changed, model(x), atol=1e-5, rtol=1e-5)
    with model.disable_adapter():
        assert torch.equal(compiled(x), model(x))
        assert not torch.allclose(compiled(x), changed, atol=1e-2)
    model.merge_adapter()
    assert torch.equal(compiled(x), model(x))


@torch.no_grad()
def test_a_batch_of_mixed_adapters_is_right_after_an_ordinary_compiled_forward() -> None:
    torch.manual_seed(0)
    model = adapted(TwoLayers(), target_modules=["linear", "conv1d"]).eval()
    compiled, x = torch.compile(model, backend="eager"), torch.randn(2, 7)
    compiled(x)
    names = ["default", "__base__"]
    torch.testing.assert_close(compiled(x, adapter_names=names), model(x, adapter_names=names), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("explicit", [True, False])
def test_a_compiled_optimizer_step_is_regularized_as_an_eager_one(explicit: bool) -> None:
    found = []
    for compiled in (False, True):
        model = adapted(TwoLayers(), target_modules=["linear"], gamma=0.1)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        if explicit:
            attach(model, optimizer)
        step = torch.compile(optimizer.step, backend="eager") if compiled else optimizer.step
        for _ in range(3):
            for parameter in model.parameters():
                parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
            step()
        found.append(gaps(model))
    assert found[1] == pytest.approx(found[0], rel=1e-5)
    assert found[0] != gaps(adapted(TwoLayers(), target_modules=["linear"]))


@pytest.mark.parametrize("folded", [False, True])
def test_a_model_is_traced_where_gradients_are_on(folded: bool) -> None:
    model, x = adapted(nn.Sequential(nn.Linear(7, 5)), target_modules=["0"]), torch.randn(4, 7)
    if folded:
        model.fold()
    traced = torch.jit.trace(model, (x,), check_trace=False)
    other = torch.randn(4, 7)
    torch.testing.assert_close(traced(other), model(other))
