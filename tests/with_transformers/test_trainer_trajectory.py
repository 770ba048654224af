"""Twenty steps under the Trainer are the twenty steps of the paper: a plain loop over U, S, V themselves."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from builders.adapters import perturb
from builders.llama import tiny_llama, token_batches
from builders.trainer_runs import attachment_of, make_trainer
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import LlamaForCausalLM

from sorsa_plugin import SORSAConfig
from sorsa_plugin.layers.layer import sorsa_layers
from sorsa_transformers import SORSACallback

STEPS, WINDOW, BATCH, WARMUP = 20, 4, 2, 4
CLIP = 0.02
DATA = token_batches(STEPS * WINDOW * BATCH)

# (update, schedule, optimizer, learning rate, gamma). The coupled penalty's gradient has norm gamma/lr * 2/sqrt(28), of
# the order of the clipped task gradient's. Its steps have a fixed length, so gamma is small enough for 20 of them not
# to reach a gap of zero, around which they would jump to and fro and magnify roundings. The decoupled pull is a tenth
# of a Newton-Schulz step.
RUNS = [
    ("coupled", None, "sgd", 1.0, 0.03),
    ("coupled", None, "adamw_torch", 1e-3, 1e-4),
    ("decoupled", "lr", "sgd", 1.0, 0.05),
    ("decoupled", "lr", "adamw_torch", 1e-3, 0.05),
    ("decoupled", "constant", "sgd", 1.0, 0.05),
    ("decoupled", "constant", "adamw_torch", 1e-3, 0.05),
]

# In float64 a gradient is a sum over chains of about 10^3 operations: relative error below 10^3 u = 1e-13. SGD adds 20
# of them times lr * CLIP = 0.02. AdamW divides by sqrt(v) + 1e-8, so an error of 1e-13 * CLIP moves an entry by at most
# lr * 2e-15 / 1e-8 = 2e-10 a step.
TOLERANCE = {"sgd": 1e-12, "adamw_torch": 20 * 2e-10}


def exact_llama() -> LlamaForCausalLM:
    """The tiny Llama, float64 throughout: transformers' own norm computes in fp32 whatever the dtype."""
    model = tiny_llama(torch.float64)
    for name, module in list(model.named_modules()):
        if type(module).__name__ == "LlamaRMSNorm":
            norm = nn.RMSNorm(module.weight.shape[0], eps=module.variance_epsilon, dtype=torch.float64)
            norm.load_state_dict(module.state_dict())
            model.set_submodule(name, norm.requires_grad_(False))
    return model


def exact_loss(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
    """Mean cross-entropy of the next token over a window, in float64 (transformers' own is fp32)."""
    logits = outputs.logits if hasattr(outputs, "logits") else outputs
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()) / WINDOW


def adapted(**options: Any) -> PeftModel:
    """Perturbed factors: at init the published gradient is rounding noise."""
    model = get_peft_model(exact_llama(), SORSAConfig(r=4, target_modules="all-linear", **options)).double()
    perturb(model, scale=0.3)
    return model


class StoredForm(nn.Module):
    """The paper's layer: y = x W_r^T + ((x V) * S) U^T with W_r = W - U0 S0 V0^T; U, S, V are the parameters."""

    def __init__(self, residual: torch.Tensor, U: torch.Tensor, S: torch.Tensor, V: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("residual", residual)
        self.U, self.S, self.V = (nn.Parameter(t.detach().clone()) for t in (U, S, V))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.residual.T + ((x @ self.V) * self.S) @ self.U.T


def stored_form(model: PeftModel) -> tuple[LlamaForCausalLM, dict[str, StoredForm]]:
    """The same model in the paper's form, and its layers by name."""
    reference, layers = exact_llama().requires_grad_(False), {}
    for layer in sorsa_layers(model):
        factors = layer.factors("default")
        weight = reference.get_submodule(layer.name).weight
        residual = weight - (factors.U0 * factors.S0) @ factors.V0.T
        layers[layer.name] = StoredForm(residual, *layer.get_factors("default"))
        reference.set_submodule(layer.name, layers[layer.name])
    return reference, layers


def rate(step: int, peak: float) -> float:
    """Linear warm-up from zero, then half a cosine."""
    if step < WARMUP:
        return peak * step / WARMUP
    return peak * (1 + math.cos(math.pi * (step - WARMUP) / (STEPS - WARMUP))) / 2


def train_by_hand(
    model: LlamaForCausalLM,
    layers: dict[str, StoredForm],
    update: str,
    schedule: str | None,
    optimizer: str,
    peak: float,
    gamma: float,
) -> None:
    parameters = [p for layer in layers.values() for p in (layer.U, layer.S, layer.V)]
    orthonormal = [p for layer in layers.values() for p in (layer.U, layer.V)]
    first, second = ([torch.zeros_like(p) for p in parameters] for _ in range(2))
    eye = torch.eye(4, dtype=torch.float64)
    examples = iter(DATA)
    for step in range(STEPS):
        model.zero_grad()
        for _ in range(WINDOW):
            ids = torch.stack([next(examples)["input_ids"] for _ in range(BATCH)])
            exact_loss(model(input_ids=ids).logits, ids).backward()
        norm = torch.stack([p.grad.norm() for p in parameters]).norm()
        assert norm > CLIP, "clipping has to matter"
        gradients = {p: p.grad * (CLIP / (norm + 1e-6)) for p in parameters}
        if update == "coupled":
            gap = torch.stack([torch.linalg.matrix_norm(P.mT @ P - eye) for P in orthonormal]).mean()
            for P, gradient in zip(orthonormal, torch.autograd.grad(gap, orthonormal), strict=True):
                gradients[P] = gradients[P] + gamma / peak * gradient
        eta = rate(step, peak)
        with torch.no_grad():
            for p, m, v in zip(parameters, first, second, strict=True):
                direction = gradients[p]
                if optimizer == "adamw_torch":
                    m.mul_(0.9).add_(0.1 * direction)
                    v.mul_(0.999).add_(0.001 * direction**2)
                    direction = m / (1 - 0.9 ** (step + 1)) / ((v / (1 - 0.999 ** (step + 1))).sqrt() + 1e-8)
                p.sub_(eta * direction)
            if update == "decoupled":
                for P in orthonormal:
                    P.sub_((gamma * eta / peak if schedule == "lr" else gamma) * P @ (P.mT @ P - eye))


def train_with_trainer(model: PeftModel, directory: Path, optimizer: str, peak: float, callbacks: list[Any]) -> None:
    trainer = make_trainer(
        model,
        directory,
        examples=len(DATA),
        compute_loss_func=exact_loss,
        callbacks=callbacks,
        max_steps=STEPS,
        per_device_train_batch_size=BATCH,
        gradient_accumulation_steps=WINDOW,
        train_sampling_strategy="sequential",
        optim=optimizer,
        learning_rate=peak,
        lr_scheduler_type="cosine",
        warmup_steps=WARMUP,
        max_grad_norm=CLIP,
    )
    trainer.train()
    assert attachment_of(trainer).steps == STEPS


def distance(model: PeftModel, layers: dict[str, StoredForm]) -> float:
    """The largest entry-wise distance over all U, S, V."""
    return max(
        float((found - expected).detach().abs().max())
        for layer in sorsa_layers(model)
        for found, expected in zip(
            layer.get_factors("default"), (getattr(layers[layer.name], part) for part in "USV"), strict=True
        )
    )


@pytest.mark.parametrize(("update", "schedule", "optimizer", "peak", "gamma"), RUNS)
def test_trainer_follows_the_papers_loop(
    update: str, schedule: str | None, optimizer: str, peak: float, gamma: float, tmp_path: Path
) -> None:
    with_callback = adapted(gamma=gamma, reg_update=update, reg_schedule=schedule)
    alone = copy.deepcopy(with_callback)
    reference, layers = stored_form(with_callback)
    unregularized, free = stored_form(with_callback)
    start = copy.deepcopy(layers)

    train_with_trainer(with_callback, tmp_path, optimizer, peak, [SORSACallback()])
    train_with_trainer(alone, tmp_path, optimizer, peak, [])
    train_by_hand(reference, layers, update, schedule, optimizer, peak, gamma)
    train_by_hand(unregularized, free, update, schedule, optimizer, peak, 0.0)

    assert distance(with_callback, layers) <= TOLERANCE[optimizer]
    assert distance(with_callback, free) > 1e4 * TOLERANCE[optimizer], "without gamma it would not differ enough"
    assert distance(with_callback, start) > 1e4 * TOLERANCE[optimizer], "nothing was trained"
    for (name, found), expected in zip(with_callback.named_parameters(), alone.parameters(), strict=True):
        assert torch.equal(found, expected), f"{name}: attached by itself differs from the callback"
