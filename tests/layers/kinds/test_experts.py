"""Stacks of experts: each matrix has triplets of its own and counts in the regularizer as one."""

from __future__ import annotations

import copy

import pytest
import torch
from builders.adapted_kinds import adapted, layers_of
from builders.adapters import perturb
from builders.layer_kinds import BOTH, EXPERTS
from peft import get_peft_model
from torch import nn

from sorsa_plugin import SORSAConfig, attach, gaps, orthonormality
from sorsa_plugin.errors import SORSAConfigError


def test_every_expert_counts_as_a_matrix_of_its_own_in_the_regularizer():
    """Gaps, loss and gradient equal those of the experts' factors taken one by one, in closed form."""
    model = adapted("experts")
    perturb(model)
    factors = {
        f"{layer.name}.default.{part}[{e}]": matrix
        for layer in layers_of(model)
        for part, stack in zip("UV", (layer.get_factors()[0], layer.get_factors()[2]), strict=True)
        for e, matrix in enumerate(stack.detach())
    }
    eye = torch.eye(2)
    expected = {name: float((P.mT @ P - eye).norm()) for name, P in factors.items()}
    found = gaps(model)
    assert found.keys() == expected.keys()
    assert len(found) == 2 * 2 * EXPERTS
    for name, gap in expected.items():
        assert found[name] == pytest.approx(gap, rel=1e-5)
    mean = orthonormality(model)
    assert mean.item() == pytest.approx(sum(expected.values()) / len(expected), rel=1e-5)

    mean.backward()
    by_autograd = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    attach(model, optimizer, gamma=0.1)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    optimizer.step()
    for name, gradient in by_autograd.items():
        added = model.get_parameter(name).grad
        torch.testing.assert_close(added, gradient, rtol=1e-4, atol=1e-7)  # gamma / eta_max = 1


def test_triplets_of_experts_are_those_of_each_matrix():
    model = adapted("experts")
    for layer in layers_of(model):
        U, S, V = layer.get_factors()
        for e, matrix in enumerate(layer.base_weight().double()):
            left, values, right = torch.linalg.svd(matrix)
            torch.testing.assert_close(S[e].double(), values[:2], rtol=1e-5, atol=0)
            best = (left[:, :2] * values[:2]) @ right[:2]
            torch.testing.assert_close(((U[e] * S[e]) @ V[e].mT).double(), best, rtol=1e-4, atol=1e-5)


def test_adapters_with_other_target_parameters_are_refused(refused):
    model = adapted("experts")
    with refused(ValueError, "all adapters must target the same set of parameters"):
        model.add_adapter("second", SORSAConfig(r=2, target_modules=[], target_parameters=["inner.down_proj"]))


def test_target_parameters_is_a_list(refused):
    with refused(SORSAConfigError, "target_parameters is 'experts'; expected a list of names"):
        SORSAConfig(target_parameters="experts")


def test_both_experts_parameters_are_wrapped_once_each():
    model = adapted("experts")
    assert {layer.parameter_name for layer in layers_of(model)} == {"gate_up_proj", "down_proj"}
    assert sorted(model.base_model.targeted_parameter_names) == sorted(BOTH["target_parameters"])


def test_a_wrapped_module_still_answers_for_all_that_it_has():
    class Router(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 8))
            self.register_buffer("bias_of_choice", torch.arange(4.0))
            self.top_k = 2

    model = nn.Sequential(Router())
    adapted = get_peft_model(model, SORSAConfig(r=2, target_modules=[], target_parameters=["0.weight"]))
    router = adapted.base_model.model[0]
    assert type(router).__name__ == "ParamWrapper"
    assert torch.equal(router.bias_of_choice, torch.arange(4.0))
    assert router.top_k == 2
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        router.nothing  # noqa: B018
    copied = copy.deepcopy(adapted).base_model.model[0]
    assert copied.base_layer is not router.base_layer
    assert copied.top_k == 2
