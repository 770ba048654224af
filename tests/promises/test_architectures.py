"""Every architecture that PEFT has default targets for starts, trains, is saved and loaded, and merges."""

from __future__ import annotations

import math

import pytest
import torch
from builders.architectures import DEFAULT_TYPES, EXTRA, first_output, tiny_inputs, tiny_model
from peft import PeftModel, get_peft_model

from sorsa_plugin import SORSAConfig
from sorsa_plugin.layers.layer import sorsa_layers

CASES = {**{name: (name, {}) for name in DEFAULT_TYPES}, **EXTRA}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.filterwarnings("ignore:(fan_in_fan_out|Setting|Model with|Input and output|Could not find a config)")
def test_an_architecture_starts_trains_saves_loads_and_merges(name, tmp_path):
    architecture, options = CASES[name]
    base = tiny_model(architecture)
    inputs = tiny_inputs(architecture, base)
    with torch.no_grad():
        plain = first_output(base, inputs)
    model = get_peft_model(base, SORSAConfig(r=2, gamma=4e-4, **options)).eval()
    assert sorsa_layers(model)
    with torch.no_grad():
        assert torch.equal(first_output(model, inputs), plain)

    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    losses = []
    for _ in range(2):
        loss = (first_output(model, inputs) - plain.roll(1, 0)).float().square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert math.isfinite(losses[1])
    assert losses[1] < losses[0]

    with torch.no_grad():
        trained = first_output(model, inputs)
        model.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(tiny_model(architecture), tmp_path).eval()
        assert torch.equal(first_output(loaded, inputs), trained)
        with model.disable_adapter():
            assert torch.equal(first_output(model, inputs), plain)
        merged = first_output(model.merge_and_unload(), inputs)
    # fp32 weights rounded once more, a few 2^-24 relative, through two layers; 1e-5 of the output's size is 100 of them
    assert (merged - trained).abs().max() <= 1e-5 * max(1.0, float(trained.abs().max()))
