"""Memory under each engine, and the estimate of activations, follow the formulas that docs/ gives."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from builders.llama import tiny_llama
from peft import get_peft_model
from transformers import LlamaConfig

from sorsa_plugin import SORSAConfig
from sorsa_plugin.tools.layer_groups import LayerGroup
from sorsa_plugin.tools.training_memory import estimate_activations, largest_block, memory


def test_fsdp2_divides_everything_zero3_not_the_frozen_factors_and_both_gather_two_blocks():
    """ZeRO-3's figures are those that docs/scaling.md measures: K + 6 T/N, with masters and gradients twice."""
    model = get_peft_model(tiny_llama(), SORSAConfig(r=3, target_modules="all-linear"))
    block = largest_block(tiny_llama())
    alone = memory(model, block, 1, "ddp", "adamw")
    assert alone.communication == 0
    ddp = memory(model, block, 4, "ddp", "adamw")
    assert ddp == replace(alone, communication=alone.gradients)
    gathered = 2 * sum(tensor.nbytes for tensor in (*block.parameters(), *block.buffers()))
    fsdp2, zero3 = (memory(model, block, 4, engine, "adamw") for engine in ("fsdp2", "zero3"))
    for name in ("weights", "frozen_factors", "trained", "gradients", "optimizer_state"):
        assert getattr(fsdp2, name) == -(-getattr(alone, name) // 4)
    assert fsdp2.communication == zero3.communication == gathered
    assert zero3.weights == fsdp2.weights
    assert zero3.frozen_factors == alone.frozen_factors
    trained = zero3.trained + zero3.gradients + zero3.optimizer_state
    assert trained == pytest.approx(6 * alone.trained / 4, abs=3)  # each rounded up to a byte
    assert memory(model, block, 1, "zero3", "adamw") == alone
    assert memory(model, block, 1, "ddp", "sgd").optimizer_state == 0
    assert memory(model, block, 1, "ddp", "adamw_8bit").optimizer_state == alone.optimizer_state // 4


def test_activations_follow_the_formula_that_is_cited():
    settings = LlamaConfig(hidden_size=64, num_hidden_layers=3, vocab_size=100)
    groups = (LayerGroup("q_proj", (64, 64), 8, 3),)
    logits = 100 * (2 + 2 + 4 + 4)
    full = 2 * (17 * 64 * 3 + 8 * 3)
    assert estimate_activations(settings, groups, torch.bfloat16, 2, 5, False) == 10 * (full + logits)
    kept = 2 * 64 * 3 + full // 3
    assert estimate_activations(settings, groups, torch.bfloat16, 2, 5, True) == 10 * (kept + logits)
