"""Attention of torch that would bypass an adapter, or that no adapter fits: made to call it, or refused."""

from __future__ import annotations

import pytest
import torch
from builders.adapted_kinds import layers_of
from builders.adapters import perturb
from peft import get_peft_model
from torch import nn

from sorsa_plugin import SORSAConfig
from sorsa_plugin.errors import UnsupportedLayerError


@pytest.mark.parametrize("targets", [["self_attn"], ["linear1", "linear2"]], ids=str)
@torch.no_grad()
def test_torchs_fused_encoder_does_not_bypass_the_adapter(targets):
    """In eval mode without gradients nn.TransformerEncoderLayer reads weights and calls no layer, padded or not."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 2).eval()
    x, padded = torch.randn(2, 5, 8), torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    plain, plain_padded = encoder(x), encoder(x, src_key_padding_mask=padded)
    model = get_peft_model(encoder, SORSAConfig(r=2, target_modules=targets))
    keep = ~padded
    # the fused kernel sums in another order: fp32, outputs of order 1
    torch.testing.assert_close(model(x), plain, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(model(x, src_key_padding_mask=padded)[keep], plain_padded[keep], rtol=1e-5, atol=1e-5)
    perturb(model, scale=0.3)
    changed = model(x)
    assert (changed - plain).abs().max() > 1e-2
    with torch.enable_grad():
        torch.testing.assert_close(model(x), changed, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(model(x[:1], src_key_padding_mask=padded[:1]), changed[:1], rtol=1e-5, atol=1e-5)


def test_an_attention_with_three_input_matrices_is_refused_and_its_matrices_are_not(refused):
    model = nn.ModuleDict({"inner": nn.MultiheadAttention(8, 2, kdim=6, vdim=4)})
    with refused(UnsupportedLayerError, "target_parameters"):
        get_peft_model(model, SORSAConfig(r=2, target_modules=["inner"]))
    names = [f"inner.{part}_proj_weight" for part in "qkv"]
    adapted = get_peft_model(model, SORSAConfig(r=2, target_modules=[], target_parameters=names))
    assert [layer.parameter_name for layer in layers_of(adapted)] == ["v_proj_weight", "k_proj_weight", "q_proj_weight"]
