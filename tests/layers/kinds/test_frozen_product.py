"""One autograd node for the base product and the change: the same outputs and gradients as with the base's own graph,
which every base module keeps that does more than multiply by a frozen weight."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from builders.adapters import perturb
from builders.one_layer import KINDS, OneLayer, adapt, inputs, make_base, only_layer
from builders.references import ROUNDOFF
from peft import PeftModel
from torch import nn
from torch.nn.modules import module as global_hooks
from torch.nn.utils import parametrize
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from sorsa_plugin import SORSAConfig, SORSALayer
from sorsa_plugin.linalg.offset_form import Parts, add_low_rank
from sorsa_plugin.linalg.residual_form import add_triplets

OUT, IN, RANK = 40, 16, 4
LAYOUTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "rows": lambda x: x,
    "one row": lambda x: x[0],
    "batch": lambda x: x.view(2, 3, IN),
    "transposed batch": lambda x: x.view(2, 3, IN).transpose(0, 1),
}
CASES = [(kind, layout) for kind in KINDS for layout in LAYOUTS if (kind, layout) != ("conv1d", "transposed batch")]
"""Conv1D refuses inputs that cannot be viewed as rows."""


def adapted(kind: str = "linear", dtype: torch.dtype = torch.float32, fold: bool = False, **options: Any) -> PeftModel:
    model = adapt(make_base(kind, (OUT, IN), dtype), r=RANK, **options)
    perturb(model)
    if fold:
        model.fold()
    return model


def source(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return inputs(IN, rows=6, dtype=dtype).requires_grad_()


def is_one_node(y: torch.Tensor) -> bool:
    """Whether the change's node is fed by the input and the offsets alone."""
    nodes = [node for node, _ in y.grad_fn.next_functions if node is not None]
    return y.grad_fn.next_functions[0][0] is None and len(nodes) == 4


def with_own_graph(model: PeftModel) -> PeftModel:
    """The base module keeps its graph, because somebody looks at its output."""
    only_layer(model).base_layer.register_forward_hook(lambda *args: None)
    return model


def step(model: PeftModel, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    """Output, gradient of x and gradients of the offsets, for an output gradient that differs between elements."""
    y = model(x)
    g = torch.randn(y.shape, generator=torch.Generator().manual_seed(2)).to(y.dtype)
    x_gradient, *others = torch.autograd.grad(y, [x, *(p for p in model.parameters() if p.requires_grad)], g)
    return y, x_gradient, others


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("fold", [False, True], ids=["intact", "folded"])
@pytest.mark.parametrize(("kind", "layout"), CASES)
def test_outputs_and_gradients_are_those_with_a_graph_of_the_base(
    kind: str, fold: bool, layout: str, dtype: torch.dtype
) -> None:
    x = LAYOUTS[layout](source(dtype))
    y, x_gradient, gradients = step(adapted(kind, dtype, fold), x)
    expected, x_expected, expected_gradients = step(with_own_graph(adapted(kind, dtype, fold)), x)
    assert is_one_node(y)
    assert not is_one_node(expected)
    assert torch.equal(y, expected)
    assert all(map(torch.equal, gradients, expected_gradients))
    # g W (out terms), D (out terms) and D R^T (2r terms) in fp32; each rounds g W, D R^T and their sum at most once
    layer = only_layer(adapted(kind, dtype, fold))
    L, R = (part.detach().abs() for part in layer.factors("default").low_rank_pair())
    residual = layer.base_matrix().float().abs()
    g = torch.randn(y.shape, generator=torch.Generator().manual_seed(2)).to(dtype).float().abs()
    U, S, V = (part.detach().abs() for part in layer.get_factors("default"))
    magnitude = g @ residual + ((g @ U) * S @ V.T if fold else g @ L @ R.T)
    exact = 2 * (OUT + 2 * RANK + 4) * ROUNDOFF[torch.float32]
    rounded = 0.0 if dtype == torch.float32 else 6 * ROUNDOFF[dtype]
    assert ((x_gradient.float() - x_expected.float()).abs() <= (exact + rounded) * magnitude).all()


@pytest.mark.parametrize("add", [add_low_rank, add_triplets])
def test_gradients_agree_with_finite_differences_in_float64(add: Any) -> None:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    weight, frozen = random(7, 5), [random(7, 3), random(3), random(5, 3)]

    def function(x: torch.Tensor, *offsets: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            y = x @ weight.T
        return add(y, x, Parts(*offsets, *frozen), weight)

    leaves = [random(2, 4, 5), random(7, 3), random(3), random(5, 3)]
    assert torch.autograd.gradcheck(function, [leaf.requires_grad_() for leaf in leaves])


@pytest.mark.parametrize(("kind", "layout"), CASES)
def test_a_new_adapter_leaves_the_output_bit_equal(kind: str, layout: str) -> None:
    x = LAYOUTS[layout](source(torch.bfloat16))
    expected = make_base(kind, (OUT, IN), torch.bfloat16)(x)
    y = adapt(make_base(kind, (OUT, IN), torch.bfloat16))(x)
    assert is_one_node(y)
    assert torch.equal(y, expected)


def test_several_active_adapters_get_their_gradients() -> None:
    found = []
    for prepare in (lambda model: model, with_own_graph):
        model = adapted()
        model.add_adapter("second", SORSAConfig(r=3, target_modules=["proj"]))
        model.base_model.set_adapter(["default", "second"])
        perturb(model, "second", seed=8)
        found.append(step(prepare(model), source()))
    (y, x_gradient, gradients), (expected, x_expected, expected_gradients) = found
    assert torch.equal(y, expected)
    assert len(gradients) == 6
    assert all(map(torch.equal, gradients, expected_gradients))
    torch.testing.assert_close(x_gradient, x_expected, rtol=1e-5, atol=1e-5)  # 60 roundings of values of order 10


@pytest.mark.parametrize("fold", [False, True], ids=["intact", "folded"])
def test_an_output_may_be_written_to_as_the_bases_may(fold: bool) -> None:
    x = LAYOUTS["batch"](source())
    model = adapted(fold=fold)
    (found,) = torch.autograd.grad(model(x).relu_().sum(), [x])
    (expected,) = torch.autograd.grad(model(x).relu().sum(), [x])
    assert torch.equal(found, expected)


class Operators(TorchDispatchMode):
    """The names of the operators that ran."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names = [*getattr(self, "names", []), func.name()]
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", KINDS)
def test_no_copy_of_the_base_output_is_made(kind: str) -> None:
    model, x = adapted(kind), LAYOUTS["batch"](source())
    with Operators() as operators:
        model(x)
    assert "aten::addmm_" in operators.names
    assert operators.names.count("aten::clone") == 1, "of the columns x V"


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("fold", [False, True], ids=["intact", "folded"])
def test_gradient_checkpointing_gives_the_same_gradients(fold: bool, reentrant: bool) -> None:
    gradients = []
    for run in (lambda f, x: f(x), lambda f, x: checkpoint(f, x, use_reentrant=reentrant)):
        model, x = adapted(fold=fold), source()
        run(lambda z, model=model: torch.tanh(model(z)), x).square().sum().backward()
        gradients.append([x.grad, *(p.grad for p in model.parameters() if p.requires_grad)])
    assert all(map(torch.equal, *gradients))


@pytest.mark.parametrize("fold", [False, True], ids=["intact", "folded"])
def test_x_and_x_times_v_are_all_that_is_kept(fold: bool) -> None:
    model, kept = adapted(fold=fold), []
    x = torch.randn(64, IN, requires_grad=True)
    own = {tensor.untyped_storage().data_ptr() for tensor in (x, *model.parameters(), *model.buffers())}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            kept.append(tensor.untyped_storage().nbytes())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        assert is_one_node(model(x))
    assert kept == [64 * RANK * 4]


# -- base modules that keep their own graph --------------------------------------------------------------------------


class Doubled(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


class Shifted(nn.Module):
    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight + 1


def replace_forward(layer: SORSALayer) -> None:
    """As accelerate does to offload."""
    base = layer.base_layer
    forward = base.forward
    base.forward = lambda x: forward(x)


MORE_THAN_A_PRODUCT: dict[str, Callable[[SORSALayer], Any]] = {
    "a forward hook": lambda layer: layer.base_layer.register_forward_hook(lambda *args: None),
    "a pre-forward hook": lambda layer: layer.base_layer.register_forward_pre_hook(lambda *args: None),
    "a backward hook": lambda layer: layer.base_layer.register_full_backward_hook(lambda *args: None),
    "a pre-backward hook": lambda layer: layer.base_layer.register_full_backward_pre_hook(lambda *args: None),
    "another forward": replace_forward,
    "a parametrised weight": lambda layer: parametrize.register_parametrization(layer.base_layer, "weight", Shifted()),
    "a trained weight": lambda layer: layer.base_layer.weight.requires_grad_(),
    "a trained bias": lambda layer: layer.base_layer.bias.requires_grad_(),
    "a gathered weight": lambda layer: setattr(layer.base_layer.weight, "ds_id", 0),
}


@pytest.mark.parametrize("fold", [False, True], ids=["intact", "folded"])
@pytest.mark.parametrize("name", MORE_THAN_A_PRODUCT)
def test_a_base_that_does_more_keeps_its_graph(name: str, fold: bool) -> None:
    model, x = adapted(fold=fold), source()
    assert is_one_node(model(x))
    MORE_THAN_A_PRODUCT[name](only_layer(model))
    y = model(x)
    assert not is_one_node(y)
    (found,) = torch.autograd.grad(y.sum(), [x])
    torch.testing.assert_close(found, numerical_gradient(model, x), rtol=1e-4, atol=1e-4)


def numerical_gradient(model: PeftModel, x: torch.Tensor) -> torch.Tensor:
    """Of the sum of a linear model's outputs, without autograd: its outputs for the unit vectors; fp32 rounding."""
    with torch.no_grad():
        return (model(torch.eye(IN)) - model(torch.zeros(1, IN))).sum(-1).expand_as(x)


def test_a_subclass_with_a_forward_of_its_own_keeps_its_graph() -> None:
    model, x = adapt(OneLayer(Doubled(IN, OUT))), source()
    perturb(model)
    y = model(x)
    assert not is_one_node(y)
    (found,) = torch.autograd.grad(y.sum(), [x])
    torch.testing.assert_close(found, numerical_gradient(model, x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("everywhere", [False, True], ids=["hook on the base", "hook on all modules"])
@pytest.mark.parametrize("grad", [True, False], ids=["training", "inference"])
def test_what_a_hook_on_the_base_kept_is_the_bases_output(grad: bool, everywhere: bool) -> None:
    """Probes and feature extractors keep the tensor that they see."""
    model, x = adapted(), source()
    base, kept = only_layer(model).base_layer, []
    expected = base(x).detach().clone()
    register = global_hooks.register_module_forward_hook if everywhere else base.register_forward_hook
    handle = register(lambda module, args, y: kept.append(y) if module is base else None)
    try:
        with torch.set_grad_enabled(grad):
            y = model(x)
    finally:
        handle.remove()
    assert torch.equal(kept[0], expected)
    assert not torch.equal(y, expected)


def test_dropout_and_autocast_keep_the_bases_graph() -> None:
    x = source()
    with torch.autocast("cpu", torch.bfloat16):
        assert not is_one_node(adapted()(x))
        assert is_one_node(adapted(dtype=torch.bfloat16)(source(torch.bfloat16)))
    dropping = adapted(sorsa_dropout=0.5)
    y, base = dropping(x), only_layer(dropping).base_layer(x)
    (found,) = torch.autograd.grad(y.sum(), [x])
    dropped = (found - torch.autograd.grad(base.sum(), [x])[0]).abs() < 1e-6
    assert 0 < dropped.sum() < dropped.numel(), "of the change alone"


@pytest.fixture
def seen() -> Iterator[list[torch.Tensor]]:
    """Output gradients of every nn.Linear, by a hook on all modules."""
    found: list[torch.Tensor] = []

    def hook(module: nn.Module, _: Any, gradients: tuple[torch.Tensor]) -> None:
        if isinstance(module, nn.Linear):
            found.append(gradients[0])

    handle = global_hooks.register_module_full_backward_hook(hook)
    yield found
    handle.remove()


def test_a_hook_on_all_modules_sees_the_bases_gradient(seen: list[torch.Tensor]) -> None:
    adapted()(source()).sum().backward()
    assert len(seen) == 1
    assert torch.equal(seen[0], torch.ones(6, OUT))


def test_a_weight_that_trains_from_now_on_gets_its_gradient() -> None:
    model, x = adapted(), source()
    model(x).sum().backward()
    weight = only_layer(model).base_layer.weight
    assert weight.grad is None
    weight.requires_grad_()
    model(x).sum().backward()
    torch.testing.assert_close(weight.grad, x.detach().sum(0).expand(OUT, IN), rtol=1e-5, atol=1e-5)


def test_a_replaced_weight_is_the_one_that_multiplies() -> None:
    model, x = adapted(), source()
    (before,) = torch.autograd.grad(model(x).sum(), [x])
    layer = only_layer(model)
    change = torch.ones(OUT, IN)
    layer.base_layer.weight = nn.Parameter(layer.base_layer.weight.detach() + change, requires_grad=False)
    y = model(x)
    assert is_one_node(y)
    (after,) = torch.autograd.grad(y.sum(), [x])
    torch.testing.assert_close(after - before, change.sum(0).expand_as(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("fold", [False, True], ids=["intact", "folded"])
def test_a_biased_base_with_a_graph_is_not_written_to_as_a_view(fold: bool) -> None:
    y = with_own_graph(adapted(fold=fold))(LAYOUTS["batch"](source()))
    assert "CopySlices" not in [node.name() for node, _ in y.grad_fn.next_functions if node is not None]
