"""torch.compile on every layer kind: one graph, whose output and gradients are those of the eager model."""

from __future__ import annotations

import pytest
import torch
from builders.adapted_kinds import adapted, layers_of
from builders.adapters import perturb
from builders.layer_kinds import KINDS, sample


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def step(model, run, x):
    """Output, and the gradients of the sum of its squares."""
    model.zero_grad()
    y = run(x)
    y.square().sum().backward()
    return y.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_compiles_to_the_same(name, backend):
    model, x = adapted(name), sample(name)
    if name.endswith("experts"):  # transformers' default loops over the experts that were chosen: no single graph
        layers_of(model)[0].get_base_layer().config._experts_implementation = "batched_mm"
    perturb(model)
    for training in (True, False):
        model.train(training)
        expected, expected_gradients = step(model, model, x)
        compiled, gradients = step(model, torch.compile(model, fullgraph=True, backend=backend), x)
        # the same fp32 sums, in inductor's order: outputs of order 1, gradients of sums over fewer than 200 of them
        torch.testing.assert_close(compiled, expected, rtol=1e-4, atol=1e-5)
        assert gradients.keys() == expected_gradients.keys()
        for key, gradient in gradients.items():
            scale = float(expected_gradients[key].abs().max())
            torch.testing.assert_close(gradient, expected_gradients[key], rtol=1e-3, atol=1e-4 * scale, msg=key)


@pytest.mark.parametrize("name", KINDS)
def test_every_layer_kind_compiles_to_one_graph_that_equals_eager(name):
    assert_compiles_to_the_same(name, "eager")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["linear", "embedding", "conv2d", "attention", "experts"])
def test_inductor_gives_what_eager_gives(name):
    assert_compiles_to_the_same(name, "inductor")
