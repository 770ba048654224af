"""Merging into files changes every kind of layer as merge_and_unload does, bit for bit, in the base's own layout."""

from __future__ import annotations

import pytest
import torch
from builders.adapters import trained
from builders.llama import tied_llama, tiny_llama
from builders.models import (
    VISION,
    made,
    tiny_gpt_oss,
    tiny_mixtral,
    tiny_opt,
    tiny_qwen3_moe,
    tiny_siglip,
    tiny_whisper,
)
from builders.saved import stored
from peft import PeftModel
from transformers import (
    ConvNextConfig,
    ConvNextModel,
    ViTConfig,
    ViTModel,
)

from sorsa_plugin import SORSALayer, merge_adapter

BOTH = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
TIED = {"ensure_weight_tying": True}

CASES = {
    "embedding": (tiny_llama, {"target_modules": ["embed_tokens"]}),
    "embedding-and-head": (tiny_llama, {"target_modules": ["embed_tokens", "lm_head", "q_proj"]}),
    "tied-embedding": (tied_llama, {"target_modules": ["embed_tokens", "q_proj"], **TIED}),
    "tied-head-bfloat16": (lambda: tied_llama(torch.bfloat16), {"target_modules": ["lm_head"], **TIED}),
    "positions": (tiny_opt, {"target_modules": ["embed_positions", "fc1"]}),
    "convolutions": (tiny_whisper, {"target_modules": ["conv1", "conv2", "q_proj", "embed_positions"]}),
    "encoder-decoder-tied": (tiny_whisper, {"target_modules": ["conv1", "embed_tokens"], **TIED}),
    "grouped-convolution": (
        lambda: made(ConvNextModel, ConvNextConfig(hidden_sizes=[8, 12, 16, 20], depths=[1, 1, 1, 1])),
        {"target_modules": ["dwconv", "pwconv1"]},
    ),
    "patches": (lambda: made(ViTModel, ViTConfig(**VISION, num_hidden_layers=2)), {"target_modules": ["projection"]}),
    "attention": (
        lambda: tiny_siglip(layers=2),
        {"target_modules": ["head.attention", "q_proj"]},
    ),
    "experts": (tiny_mixtral, {"target_modules": ["q_proj"], "target_parameters": BOTH}),
    "experts-bfloat16": (lambda: tiny_mixtral().bfloat16(), {"target_modules": [], "target_parameters": BOTH}),
    "one-of-the-experts": (tiny_qwen3_moe, {"target_modules": ["v_proj"], "target_parameters": BOTH[:1]}),
    "experts-stored-fused": (
        lambda: tiny_gpt_oss(experts=4).bfloat16(),
        {"target_modules": ["q_proj"], "target_parameters": BOTH},
    ),
    "experts-in-whole": (tiny_mixtral, {"target_modules": ["q_proj"], "modules_to_save": ["experts"]}),
    "matrix-parameter": (tiny_llama, {"target_modules": ["q_proj"], "target_parameters": ["mlp.up_proj.weight"]}),
    "tokens": (tiny_llama, {"target_modules": ["q_proj"], "trainable_token_indices": [3, 5]}),
    "tokens-tied": (tied_llama, {"target_modules": ["q_proj"], "trainable_token_indices": [3, 5]}),
    "tokens-of-two": (
        lambda: tiny_llama(torch.bfloat16),
        {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [3], "lm_head": [9, 4]}},
    ),
}


@pytest.mark.parametrize("shard_size", ["20KB", "5GB"])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.filterwarnings("ignore:(Model has|Model with|Setting|Input and output|You have)")
def test_every_tensor_is_the_one_of_merge_and_unload_in_the_bases_layout(tmp_path, case, shard_size):
    make, options = CASES[case]
    model_class = type(make())
    make().save_pretrained(tmp_path / "base", max_shard_size=shard_size)
    before = model_class.from_pretrained(tmp_path / "base").state_dict()
    adapted = trained(model_class.from_pretrained(tmp_path / "base"), **options)
    adapted.save_pretrained(tmp_path / "sorsa")
    report = merge_adapter(tmp_path / "base", tmp_path / "sorsa", tmp_path / "merged", safe=True)
    base = model_class.from_pretrained(tmp_path / "base")
    reference = PeftModel.from_pretrained(base, tmp_path / "sorsa").merge_and_unload().state_dict()
    found, info = model_class.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not any(info.values())
    assert found.state_dict().keys() == reference.keys()
    state = found.state_dict()
    for name, tensor in state.items():
        assert tensor.dtype == before[name].dtype, name
        assert torch.equal(tensor, reference[name]), name
    changed = {name for name, tensor in state.items() if not torch.equal(tensor, before[name])}
    expected = {layer.parameter_path for layer in adapted.modules() if isinstance(layer, SORSALayer)}
    expected |= set(report.with_trained_tokens)
    expected |= set(report.replaced) if "modules_to_save" in options else set()  # else they are the base's
    assert changed == expected
    assert not report.untied
    assert layouts(tmp_path / "merged") == layouts(tmp_path / "base")
    for path in (tmp_path / "base").glob("*.json"):
        assert (tmp_path / "merged" / path.name).read_bytes() == path.read_bytes()


def layouts(directory):
    """{shard: its tensors' names, dtypes and shapes}"""
    return {
        shard: [(name, tensor.dtype, tensor.shape) for name, tensor in tensors.items()]
        for shard, tensors in stored(directory).items()
    }
