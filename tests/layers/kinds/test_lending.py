"""Layers that lend their module the changed weight, and parameters that no layer fits."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from threading import Barrier, BrokenBarrierError

import pytest
import torch
from builders.adapted_kinds import adapted, layers_of
from builders.adapters import perturb
from builders.layer_kinds import KINDS, sample
from peft import get_peft_model
from torch import nn

from sorsa_plugin import SORSAConfig
from sorsa_plugin.errors import UnsupportedLayerError

LENDING = [name for name, kind in KINDS.items() if kind.lends]

TOLERANCE = {"rtol": 1e-4, "atol": 2e-5}
"""fp32 against float64: outputs of order 1 after at most two layers of sums over fewer than 60 terms, each term with
a relative error of a few 2^-24 = 6e-8; 2e-5 leaves a factor of about five."""


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.mark.parametrize("name", LENDING)
def test_threads_that_use_one_model_take_turns_at_a_weight_that_is_lent(name):
    """Two forwards wait for each other inside the base module, as long as both can be there."""
    model, x = adapted(name), sample(name)
    perturb(model)
    expected, both_inside = model(x), Barrier(2)

    def meet(*_):
        with suppress(BrokenBarrierError):
            both_inside.wait(timeout=0.1)

    layers_of(model)[0].get_base_layer().register_forward_pre_hook(meet)
    with ThreadPoolExecutor(2) as threads:
        for y in threads.map(model, [x, x]):
            torch.testing.assert_close(y, expected, **TOLERANCE)
    assert both_inside.broken


def test_a_parameter_that_is_no_matrix_is_refused(refused):
    model = nn.ModuleDict({"inner": nn.Linear(8, 6)})
    with refused(UnsupportedLayerError, r"has shape \(6,\); expected a matrix"):
        get_peft_model(model, SORSAConfig(r=2, target_modules=[], target_parameters=["inner.bias"]))
