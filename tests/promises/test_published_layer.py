"""The layer computes and trains what the published code does (PyPI `sorsa` 1.0.1, its `layer.py` alone).

Compared at alpha=None, in fp32, with perturbed factors.
The published layer stores A = V^T (r x in), S (r), B = U (out x r) and the residual weight W_r = W - U S V^T.
"""

from __future__ import annotations

import importlib.util
from importlib import metadata
from types import ModuleType

import pytest
import torch
from builders.adapters import perturb
from builders.one_layer import SHAPES, adapt, inputs, make_base, only_layer
from builders.references import ROUNDOFF, forward_bound, paper_weights
from torch import nn

from sorsa_plugin import orthonormality

U32 = ROUNDOFF[torch.float32]


@pytest.fixture(scope="module")
def published() -> ModuleType:
    """The published `layer.py`, loaded by path: the package's __init__ does not import with transformers 5."""
    try:
        path = metadata.distribution("sorsa").locate_file("sorsa/layer.py")
    except metadata.PackageNotFoundError:
        pytest.skip("the oracle is not installed: pip install --no-deps sorsa==1.0.1")
    spec = importlib.util.spec_from_file_location("published_sorsa_layer", str(path))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Pair:
    """The published layer and ours on the same weight, both at init."""

    def __init__(self, published: ModuleType, shape: tuple[int, int], rank: int, bias: bool = True) -> None:
        base = make_base("linear" if bias else "linear-without-bias", shape)
        self.weight = base.proj.weight.detach().clone()
        self.theirs = published.Linear(shape[1], shape[0], r=rank, alpha=None, bias=bias)
        self.theirs.weight.data = self.weight.clone()
        if bias:
            self.theirs.bias.data = base.proj.bias.detach().clone()
        self.theirs.sorsa_init()
        self.model = adapt(base, r=rank, svd="exact")
        self.ours = only_layer(self.model)
        self.shape, self.rank = shape, rank

    def perturb(self) -> Pair:
        """Move our factors, and give the published layer the same ones and the residual of the same initial ones."""
        perturb(self.model)
        residual, U, S, V = paper_weights(self.ours)
        with torch.no_grad():
            self.theirs.weight.copy_(residual)
            self.theirs.sorsa_A.copy_(V.T)
            self.theirs.sorsa_S.copy_(S)
            self.theirs.sorsa_B.copy_(U)
        return self


@pytest.fixture(params=[(name, rank) for name in SHAPES for rank in (1, 4, 16)], ids=lambda p: f"{p[0]}-rank{p[1]}")
def pair(request, published) -> Pair:
    name, rank = request.param
    return Pair(published, SHAPES[name], rank)


def their_bound(pair: Pair, x: torch.Tensor) -> torch.Tensor:
    """What the published forward may err by: it adds two large products, each of `in` terms, and forms U S V^T
    (r terms, 2 roundings) before; its stored W_r, U, S, V are one rounding away from ours."""
    residual, U, S, V = (part.abs() for part in paper_weights(pair.ours))
    size = x.double().abs() @ (residual + (U * S) @ V.T).T + pair.theirs.bias.detach().double().abs()
    return (pair.shape[1] + pair.rank + 8) * U32 * size


def test_the_initial_split_is_the_published_one(pair):
    theirs, ours = pair.theirs, pair.ours
    U, S, V = (part.detach() for part in ours.get_factors())
    size = float(S[0])
    error = 2 * max(pair.shape) * U32 * size  # backward error of each of the two decompositions (one is of W^T)
    assert (theirs.sorsa_S - S).abs().max() <= 2 * error
    # singular vectors: up to a common sign, and to backward error over the gap to the neighbours (Davis-Kahan)
    values = torch.linalg.svdvals(pair.weight.double())
    for i in range(pair.rank):
        others = torch.cat((values[:i], values[i + 1 :], torch.zeros(int(pair.shape[0] != pair.shape[1]))))
        limit = 4 * error / float((others - values[i]).abs().min()) + 1e-5
        sign = torch.sign(theirs.sorsa_B[:, i] @ U[:, i])
        assert (sign * theirs.sorsa_B[:, i] - U[:, i]).norm() <= limit
        assert (sign * theirs.sorsa_A[i] - V[:, i]).norm() <= limit
    # the residual weight is free of the signs: both are W - (best rank-r part), to backward error over the gap at r
    gap = float(values[pair.rank - 1] - (values[pair.rank] if pair.rank < len(values) else 0))
    residual = paper_weights(ours)[0]
    limit = 4 * error * pair.rank**0.5 * (1 + size / gap)
    assert (theirs.weight.double() - residual).norm() <= limit


def test_the_output_at_init_is_the_published_one(pair):
    x = inputs(pair.shape[1])
    # W_r and U S V^T come from another decomposition of the same weight: their sum is W up to the split's rounding
    bound = their_bound(pair, x) + forward_bound(pair.ours, x) + 4 * U32 * pair.rank * x.double().abs().sum(1)[:, None]
    assert ((pair.theirs(x) - pair.model(x)).double().abs() <= bound).all()


def test_the_output_of_moved_factors_is_the_published_one(pair):
    x = inputs(pair.shape[1])
    before = pair.model(x).detach()
    pair.perturb()
    assert (pair.model(x) - before).norm() > 1e-2 * before.norm()  # there is something to agree about
    bound = their_bound(pair, x) + forward_bound(pair.ours, x)
    assert ((pair.theirs(x) - pair.model(x)).double().abs() <= bound).all()


def test_the_gradients_of_moved_factors_are_the_published_ones(pair):
    pair.perturb()
    x, g = inputs(pair.shape[1]), inputs(pair.shape[0], seed=5)
    (pair.model(x) * g).sum().backward()
    (pair.theirs(x) * g).sum().backward()
    factors, theirs = pair.ours.factors("default"), pair.theirs
    # chains of up to three products of n terms each, sqrt(n) u apiece, on both sides; 10 for sums that cancel
    tolerance = 2 * 10 * 3 * (sum(pair.shape) + 5) ** 0.5 * U32
    expected = {"dU": theirs.sorsa_B.grad, "dS": theirs.sorsa_S.grad, "dV": theirs.sorsa_A.grad.T}
    for name, reference in expected.items():
        found = factors.get_parameter(name).grad
        assert (found - reference).norm() <= tolerance * reference.norm(), name


def test_the_merged_weight_of_moved_factors_is_the_published_one(pair):
    pair.perturb()
    pair.theirs._merge(True)
    residual, U, S, V = (part.abs() for part in paper_weights(pair.ours))
    # both: one rounding of each of W_r, the product (r terms, 2 more), the sum; ours of W, L R^T (2r terms, 6) likewise
    size = residual + (U * S) @ V.T
    L, R = (part.detach().double().abs() for part in pair.ours.factors("default").low_rank_pair())
    bound = (pair.rank + 6) * U32 * size + (2 * pair.rank + 8) * U32 * (pair.weight.double().abs() + L @ R.T)
    pair.model.merge_adapter()
    difference = pair.ours.get_base_layer().weight.detach() - pair.theirs.weight.detach()
    assert (difference.double().abs() <= bound).all()


def test_the_regularizer_is_the_published_calc_ortho_with_its_gradient(pair, published):
    pair.perturb()
    ours, theirs = orthonormality(pair.model), published.calc_ortho(pair.theirs)
    # a Gram matrix of n-term inner products, entries up to about 1: n u each, sqrt(r) of the diagonal in the norm
    n = max(pair.shape)
    limit = 2 * n * U32 * pair.rank**0.5 * 2
    value = float(theirs.detach())
    assert abs(float(ours.detach()) - value) <= limit
    assert value > 100 * limit

    ours.backward()
    theirs.backward()
    factors = pair.ours.factors("default")
    # 2/(F n) P E: E errs by n u relative to entries of 1, the quotient by that over the gap
    tolerance = 8 * n * U32 * pair.rank**0.5 / value
    for found, reference in ((factors.dU, pair.theirs.sorsa_B.grad), (factors.dV, pair.theirs.sorsa_A.grad.T)):
        assert (found.grad - reference).norm() <= tolerance * reference.norm()


def test_the_regularizer_of_several_layers_is_their_published_mean(published):
    pairs = [Pair(published, SHAPES[name], rank).perturb() for name, rank in (("tall", 2), ("wide", 5), ("square", 3))]
    ours = torch.stack([orthonormality(pair.model) for pair in pairs]).mean()  # two factors each: a mean of means
    theirs = published.calc_ortho(nn.ModuleList(pair.theirs for pair in pairs))
    assert abs(float(ours.detach() - theirs.detach())) <= 2 * 40 * U32 * 5**0.5 * 2


def test_a_step_of_plain_gradient_descent_moves_both_alike(pair):
    pair.perturb()
    x = inputs(pair.shape[1])
    factors, theirs = pair.ours.factors("default"), pair.theirs
    for model, parameters in (
        (pair.model, [factors.dU, factors.dS, factors.dV]),
        (theirs, [theirs.sorsa_B, theirs.sorsa_S, theirs.sorsa_A]),
    ):
        model(x).square().mean().backward()
        with torch.no_grad():
            for parameter in parameters:
                parameter -= 0.1 * parameter.grad
    U, S, V = (part.detach() for part in pair.ours.get_factors())
    # a step of 0.1 of gradients that agree to the tolerance above, and one rounding of values up to 1 + |offset|
    tolerance = 2 * 10 * 3 * (sum(pair.shape) + 5) ** 0.5 * U32 * 0.1
    moved = ((U, theirs.sorsa_B), (S, theirs.sorsa_S), (V.T, theirs.sorsa_A))
    for found, reference in moved:
        step = tolerance * reference.grad.norm()
        assert (found - reference.detach()).norm() <= step + 4 * U32 * reference.detach().norm()
