"""Merging into files changes every kind of layer as merge_and_unload does, bit for bit, in the base's own layout."""

from __future__ import annotations

import pytest
import torch
from builders.merging import llama, mixtral, stored, trained
from peft import PeftModel
from transformers import (
    ConvNextConfig,
    ConvNextModel,
    GptOssConfig,
    GptOssForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    SiglipVisionConfig,
    SiglipVisionModel,
    ViTConfig,
    ViTModel,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

from sorsa_plugin import SORSALayer, merge_adapter

TOKENS = {"vocab_size": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
VISION = {**SIZES, "image_size": 16, "patch_size": 8}


def made(model_class, config):
    torch.manual_seed(1)
    return model_class(config).eval()


def opt():
    sizes = {**SIZES, **TOKENS, "ffn_dim": 48, "word_embed_proj_dim": 32, "max_position_embeddings": 64}
    return made(OPTForCausalLM, OPTConfig(**sizes))


def whisper():
    sizes = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "decoder_start_token_id": 1}
    lengths = {"num_mel_bins": 8, "max_source_positions": 10, "max_target_positions": 16}
    return made(WhisperForConditionalGeneration, WhisperConfig(**sizes, **heads, **lengths, **TOKENS))


def gpt_oss():
    sizes = {**SIZES, **TOKENS, "num_key_value_heads": 2, "head_dim": 8}
    return made(GptOssForCausalLM, GptOssConfig(**sizes, num_local_experts=4, num_experts_per_tok=2)).bfloat16()


def qwen3_moe():
    sizes = {**SIZES, **TOKENS, "num_key_value_heads": 2, "head_dim": 8, "moe_intermediate_size": 24}
    return made(Qwen3MoeForCausalLM, Qwen3MoeConfig(**sizes, num_experts=4, num_experts_per_tok=2))


BOTH = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
TIED = {"ensure_weight_tying": True}
CASES = {
    "embedding": (llama, {"target_modules": ["embed_tokens"]}),
    "embedding-and-head": (llama, {"target_modules": ["embed_tokens", "lm_head", "q_proj"]}),
    "tied-embedding": (lambda: llama(tied=True), {"target_modules": ["embed_tokens", "q_proj"], **TIED}),
    "tied-head-bfloat16": (lambda: llama(True, torch.bfloat16), {"target_modules": ["lm_head"], **TIED}),
    "positions": (opt, {"target_modules": ["embed_positions", "fc1"]}),
    "convolutions": (whisper, {"target_modules": ["conv1", "conv2", "q_proj", "embed_positions"]}),
    "encoder-decoder-tied": (whisper, {"target_modules": ["conv1", "embed_tokens"], **TIED}),
    "grouped-convolution": (
        lambda: made(ConvNextModel, ConvNextConfig(hidden_sizes=[8, 12, 16, 20], depths=[1, 1, 1, 1])),
        {"target_modules": ["dwconv", "pwconv1"]},
    ),
    "patches": (lambda: made(ViTModel, ViTConfig(**VISION)), {"target_modules": ["projection"]}),
    "attention": (
        lambda: made(SiglipVisionModel, SiglipVisionConfig(**VISION)),
        {"target_modules": ["head.attention", "q_proj"]},
    ),
    "experts": (mixtral, {"target_modules": ["q_proj"], "target_parameters": BOTH}),
    "experts-bfloat16": (lambda: mixtral().bfloat16(), {"target_modules": [], "target_parameters": BOTH}),
    "one-of-the-experts": (qwen3_moe, {"target_modules": ["v_proj"], "target_parameters": BOTH[:1]}),
    "experts-stored-fused": (gpt_oss, {"target_modules": ["q_proj"], "target_parameters": BOTH}),
    "experts-in-whole": (mixtral, {"target_modules": ["q_proj"], "modules_to_save": ["experts"]}),
    "matrix-parameter": (llama, {"target_modules": ["q_proj"], "target_parameters": ["mlp.up_proj.weight"]}),
    "tokens": (llama, {"target_modules": ["q_proj"], "trainable_token_indices": [3, 5]}),
    "tokens-tied": (lambda: llama(True), {"target_modules": ["q_proj"], "trainable_token_indices": [3, 5]}),
    "tokens-of-two": (
        lambda: llama(dtype=torch.bfloat16),
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
