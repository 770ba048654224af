"""One adapted layer and its optimizer, stepped by hand, and the step of the paper's formulas in float64."""

from __future__ import annotations

import torch
from peft import PeftModel
from torch import nn
from torch.optim import SGD, Optimizer

from builders.adapters import perturb
from builders.one_layer import adapt, inputs, make_base, only_layer

LR = 1e-3
GAMMA = 0.1


def one_layer(dtype: torch.dtype = torch.float64, **options: object) -> PeftModel:
    """One adapted linear layer with perturbed factors; its trained parameters are dU, dS, dV."""
    options.setdefault("gamma", GAMMA)
    model = adapt(make_base(), **options).to(dtype)
    perturb(model, scale=0.3)
    return model


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def sgd(model: nn.Module, lr: float = LR) -> SGD:
    return SGD(trained(model), lr=lr)


def backward(model: nn.Module, rows: int = 5) -> None:
    dtype = only_layer(model).base_matrix().dtype
    model(inputs(24, rows, dtype)).square().mean().backward()


def step(model: nn.Module, optimizer: Optimizer) -> None:
    optimizer.zero_grad()
    backward(model)
    optimizer.step()


def values(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(first[name], second[name]) for name in first)


def exact_step(model: nn.Module, *, gamma: float, update: str, lr: float = LR) -> dict[str, torch.Tensor]:
    """U, S, V after one SGD step: the task's gradient by autograd, the regularizer's by the paper's formulas."""
    model.zero_grad()
    backward(model)
    layer = only_layer(model)
    P = dict(zip("USV", (t.detach() for t in layer.get_factors()), strict=True))
    gradients = {part: layer.factors("default").get_parameter(f"d{part}").grad.clone() for part in "USV"}
    model.zero_grad()
    eye = torch.eye(P["S"].shape[0], dtype=P["S"].dtype)
    if update == "coupled":
        leaves = {part: P[part].clone().requires_grad_() for part in "UV"}
        torch.stack([torch.linalg.matrix_norm(p.mT @ p - eye) for p in leaves.values()]).mean().backward()
        for part, leaf in leaves.items():
            gradients[part] += gamma / lr * leaf.grad
    P = {part: P[part] - lr * gradients[part] for part in "USV"}
    if update == "decoupled":
        for part in "UV":
            P[part] = P[part] - gamma * P[part] @ (P[part].mT @ P[part] - eye)
    return P


def regularized(model: nn.Module, optimizers: list[Optimizer]) -> dict[str, torch.Tensor]:
    """What a step without task moves."""
    before = values(model)
    for parameter in trained(model):
        parameter.grad = torch.zeros_like(parameter)
    for optimizer in optimizers:
        optimizer.step()
    return {name: value - before[name] for name, value in values(model).items()}
