"""An optimizer around another, or a step within a step, regularizes once."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from builders.regularized_steps import LR, backward, one_layer, same, sgd, step, trained, values
from torch import nn
from torch.optim import SGD, Optimizer

from sorsa_plugin import attach

ATTACHED = "attached itself"


class Around(Optimizer):
    """An optimizer that steps another one on the same parameter groups, as Lookahead and SAM do."""

    def __init__(self, base: Optimizer, name: str) -> None:
        super().__init__(base.param_groups, {})
        self.param_groups = base.param_groups
        self.name = name
        setattr(self, name, base)

    def step(self, closure: Callable | None = None) -> None:  # type: ignore[override]
        getattr(self, self.name).step(closure)


@pytest.mark.parametrize("name", ["optimizer", "base_optimizer"])
@pytest.mark.parametrize("update", ["coupled", "decoupled"])
def test_an_optimizer_around_another_acts_once(update: str, name: str, log: Callable) -> None:
    alone, wrapped = one_layer(reg_update=update), one_layer(reg_update=update)
    for model, optimizer in ((alone, sgd(alone)), (wrapped, Around(sgd(wrapped), name))):
        for _ in range(3):
            step(model, optimizer)
    assert same(values(alone), values(wrapped))
    assert len(log(ATTACHED)) == 2


class Several(Optimizer):
    """Several optimizers in one, as Muon for matrices with AdamW for the rest."""

    def __init__(self, model: nn.Module) -> None:
        matrices, others = ([p for p in trained(model) if (p.ndim == 2) == two] for two in (True, False))
        self.parts = [SGD(matrices, lr=LR), SGD(others, lr=LR)]
        super().__init__([group for part in self.parts for group in part.param_groups], {})
        self.param_groups = [group for part in self.parts for group in part.param_groups]

    def step(self, closure: Callable | None = None) -> None:  # type: ignore[override]
        for part in self.parts:
            part.step()


class CallsSuper(SGD):
    """Of another class than SGD, so that torch puts hooks on both steps."""

    def step(self, closure: Callable | None = None) -> None:  # type: ignore[override]
        return super().step(closure)


@pytest.mark.parametrize("update", ["coupled", "decoupled"])
@pytest.mark.parametrize("attached", ["by itself", "outside", "inside"])
@pytest.mark.parametrize("kind", ["super", "several", "several, loaded"])
def test_a_step_within_a_step_regularizes_once(kind: str, attached: str, update: str) -> None:
    models = one_layer(reg_update=update), one_layer(reg_update=update)
    plain = sgd(models[0])
    optimizer = CallsSuper(trained(models[1]), lr=LR) if kind == "super" else Several(models[1])
    if "loaded" in kind:  # as accelerate does: the groups are new dictionaries then
        optimizer.load_state_dict(optimizer.state_dict())
    if attached != "by itself":
        attach(models[1], optimizer if attached == "outside" or kind == "super" else optimizer.parts[0])
    for _ in range(3):
        step(models[0], plain)
        step(models[1], optimizer)
    assert same(*map(values, models))


def test_a_step_that_raised_leaves_the_next_optimizer_of_its_groups_regularized() -> None:
    class Breaks(SGD):
        def step(self, closure: Callable | None = None) -> None:  # type: ignore[override]
            raise MemoryError

    models = one_layer(), one_layer()
    broken = Breaks(trained(models[0]), lr=LR)
    backward(models[0])
    with pytest.raises(MemoryError):
        broken.step()
    models[0].zero_grad()
    for model, optimizer in zip(models, (SGD(broken.param_groups), sgd(models[1])), strict=True):
        step(model, optimizer)
    assert same(*map(values, models))


def test_an_optimizer_that_knows_one_of_another_model_is_regularized_all_the_same() -> None:
    models = one_layer(), one_layer()
    other = one_layer()
    partner = sgd(other)
    attach(other, partner)
    optimizers = [sgd(model) for model in models]
    optimizers[0].partner = partner  # type: ignore[attr-defined]
    for model, optimizer in zip(models, optimizers, strict=True):
        step(model, optimizer)
    assert same(*map(values, models))


@pytest.mark.parametrize("name", ["optimizer", "base_optimizer"])
@pytest.mark.parametrize("update", ["coupled", "decoupled"])
@pytest.mark.parametrize("with_closure", [True, False])
@pytest.mark.parametrize("attached", [True, False])
def test_an_optimizer_around_an_attached_one_or_with_a_closure_acts_once(
    attached: bool, with_closure: bool, update: str, name: str
) -> None:
    models = one_layer(reg_update=update), one_layer(reg_update=update)
    for model in models:
        base = sgd(model)
        optimizer = base if model is models[0] else Around(base, name)
        if attached:
            attach(model, base)

        def closure(model: nn.Module = model, base: Optimizer = base) -> None:
            base.zero_grad()
            backward(model)

        for _ in range(2):
            if not with_closure:
                closure()
            optimizer.step(closure if with_closure else None)
    assert same(*map(values, models))


@pytest.mark.parametrize("name", ["optimizer", "base_optimizer"])
def test_an_optimizer_around_an_attached_one_keeps_the_gamma_that_was_given(name: str) -> None:
    models = one_layer(), one_layer()
    for model in models:
        base = sgd(model)
        attach(model, base, gamma=0.3)
        step(model, base if model is models[0] else Around(base, name))
    assert same(*map(values, models))
