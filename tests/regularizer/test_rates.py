"""Attaching logs one line on a learning rate that is far from what is known, either way, and none otherwise."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model
from torch import nn

from sorsa_plugin import SORSAConfig, attach


def attached(rate: float, kind: type = torch.optim.AdamW) -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict({"q_proj": nn.Linear(128, 128), "up_proj": nn.Linear(128, 384)})
    model = get_peft_model(model, SORSAConfig(r=16, target_modules=["q_proj", "up_proj"]))
    attach(model, kind([p for p in model.parameters() if p.requires_grad], lr=rate))


@pytest.mark.parametrize(("rate", "side"), [(3e-5, "below"), (5e-4, "below"), (2e-2, "above")])
def test_a_rate_that_is_far_off_gets_one_line_with_the_suggested_one(rate, side, caplog):
    attached(rate)
    (record,) = caplog.records
    assert record.getMessage().startswith(
        f"The learning rate {rate:g} is far {side} what suits SORSA at width 128 and rank 16: "
        "try 0.003 (0.0008 to 0.01). "
    )


@pytest.mark.parametrize("rate", [1e-3, 3e-3, 1e-2])
def test_a_rate_inside_the_range_gets_none(rate, caplog):
    attached(rate)
    assert not caplog.records


def test_nothing_is_said_about_optimizers_whose_rates_are_not_known(caplog):
    attached(1.0, torch.optim.SGD)
    assert not caplog.records
