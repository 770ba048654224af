"""What "all-linear" adapts, what it leaves out, and that a saved adapter keeps the choice."""

from __future__ import annotations

import pytest
import torch
from builders.adapters import assert_same_tensors, perturb
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import MambaConfig, MambaForCausalLM, SiglipVisionConfig, SiglipVisionModel

from sorsa_plugin import SORSAConfig
from sorsa_plugin.errors import UnsupportedLayerError
from sorsa_plugin.layers.layer import sorsa_layers


def siglip() -> nn.Module:
    """Attention of its own, with a linear `out_proj`, and torch's in the pooling head."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_hidden_layers": 1}
    return SiglipVisionModel(SiglipVisionConfig(**sizes, image_size=8, patch_size=4)).eval()


def encoder() -> nn.Module:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()


def computed() -> nn.Module:
    torch.manual_seed(0)
    return nn.ModuleDict({"plain": nn.Linear(6, 5), "normed": nn.utils.parametrizations.weight_norm(nn.Linear(5, 4))})


def mamba() -> nn.Module:
    torch.manual_seed(0)
    return MambaForCausalLM(MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=1, state_size=4))


def names(model: nn.Module) -> set[str]:
    return {layer.name for layer in sorsa_layers(model)}


@pytest.mark.parametrize(
    ("make", "left_out", "beside"),
    [
        (siglip, "head.attention.out_proj", "encoder.layers.0.self_attn.out_proj"),
        (encoder, "layers.0.self_attn.out_proj, layers.1.self_attn.out_proj", "layers.0.linear1"),
        (computed, "normed", "plain"),
        (mamba, "backbone.layers.0.mixer.out_proj", "backbone.layers.0.mixer.in_proj"),
    ],
)
def test_all_linear_adapts_what_it_can_and_names_in_one_line_what_it_leaves_out(
    make, left_out, beside, caplog, tmp_path
):
    base = make()
    linear = {name for name, module in base.named_modules() if isinstance(module, nn.Linear)} - {"lm_head"}
    model = get_peft_model(base, SORSAConfig(r=2, target_modules="all-linear"))
    assert names(model) == linear - set(left_out.split(", "))
    assert beside in names(model)
    [line] = [record.getMessage() for record in caplog.records if "leaves out" in record.getMessage()]
    assert f"leaves out {left_out}, which" in line
    perturb(model)
    model.save_pretrained(tmp_path)
    caplog.clear()
    assert_same_tensors(PeftModel.from_pretrained(make(), tmp_path).state_dict(), model.state_dict())
    assert not caplog.records


def test_what_is_named_by_hand_or_all_that_there_is_remains_an_error():
    with pytest.raises(UnsupportedLayerError, match=r"head\.attention\.out_proj .*as a whole"):
        get_peft_model(siglip(), SORSAConfig(r=2, target_modules=["out_proj"]))
    base = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(6, 5)))
    with pytest.raises(UnsupportedLayerError, match="computed from other parameters"):
        get_peft_model(base, SORSAConfig(r=2, target_modules="all-linear"))


def test_what_is_excluded_is_not_said_to_be_left_out(caplog):
    config = SORSAConfig(r=2, target_modules="all-linear", exclude_modules=["head.attention.out_proj"])
    get_peft_model(siglip(), config)
    assert not caplog.records


def test_a_second_adapter_is_chosen_as_the_first():
    model = get_peft_model(siglip(), SORSAConfig(r=2, target_modules="all-linear"))
    model.add_adapter("second", SORSAConfig(r=2, target_modules="all-linear", svd_seed=1))
    assert all(set(layer.configs) == {"default", "second"} for layer in sorsa_layers(model))
