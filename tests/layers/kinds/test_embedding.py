"""Embeddings: the rows that train, and tables that no adapter fits."""

from __future__ import annotations

import torch
from builders.adapted_kinds import adapted, layers_of
from builders.adapters import perturb
from peft import get_peft_model
from torch import nn

from sorsa_plugin import SORSAConfig
from sorsa_plugin.errors import UnsupportedLayerError


def test_a_padding_tokens_row_is_not_trained():
    model = adapted("embedding")
    perturb(model)
    model(torch.tensor([[1, 4]])).square().sum().backward()
    gradient = layers_of(model)[0].factors("default").dV.grad
    assert gradient[1].abs().sum() == 0
    assert gradient[4].abs().sum() > 0


def test_an_embedding_with_max_norm_is_refused(refused):
    model = nn.ModuleDict({"inner": nn.Embedding(20, 4, max_norm=1.0)})
    with refused(UnsupportedLayerError, r"max_norm=1\.0 rewrites its weight"):
        get_peft_model(model, SORSAConfig(r=2, target_modules=["inner"]))
