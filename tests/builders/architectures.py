"""Tiny random models from configs: every transformers architecture that PEFT has default targets for, and others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as DEFAULT_TARGETS
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSeq2SeqLM,
    AutoModelForSpeechSeq2Seq,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
)

NOT_IN_TRANSFORMERS = ("chatglm", "RefinedWebModel", "RefinedWeb", "btlm", "rwkv7")
"""Model types of PEFT's table whose code lives on the hub."""

TOKENS = {"vocab_size": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48, **TOKENS}
GROUPED = {**SIZES, "num_key_value_heads": 2}
ENCODER_DECODER = {
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    **TOKENS,
}
T5 = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 4, "decoder_start_token_id": 0, **TOKENS}
MOE = {"num_local_experts": 4, "num_experts_per_tok": 2}
IMAGE = {"image_size": 16, "patch_size": 8, "num_channels": 3}
_VISION = {
    name: SIZES[name] for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
}

OPTIONS: dict[str, dict[str, Any]] = {
    "t5": T5,
    "mt5": T5,
    "bart": {**ENCODER_DECODER, "init_std": 0.2},
    "whisper": {
        **ENCODER_DECODER,
        "num_mel_bins": 8,
        "max_source_positions": 10,
        "max_target_positions": 16,
        "decoder_start_token_id": 1,
        "suppress_tokens": None,
        "begin_suppress_tokens": None,
    },
    "opt": {**SIZES, "ffn_dim": 48, "word_embed_proj_dim": 32, "max_position_embeddings": 64},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32, **TOKENS},
    "gptj": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32, "rotary_dim": 4, **TOKENS},
    "gpt_bigcode": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32, **TOKENS},
    "codegen": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32, "rotary_dim": 4, **TOKENS},
    "gpt_neo": {
        "hidden_size": 32,
        "num_layers": 2,
        "num_heads": 4,
        "attention_types": [[["global", "local"], 1]],
        "max_position_embeddings": 32,
        **TOKENS,
    },
    "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 4, **TOKENS},
    "mpt": {"d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 32, **TOKENS},
    "deberta": {**SIZES, "relative_attention": True, "pos_att_type": "c2p|p2c"},
    "electra": {**SIZES, "embedding_size": 32},
    "gemma": {**GROUPED, "head_dim": 8},
    "gemma2": {**GROUPED, "head_dim": 8, "query_pre_attn_scalar": 8},
    "gemma3_text": {**GROUPED, "head_dim": 8},
    "mistral": GROUPED,
    "qwen2": GROUPED,
    "qwen3": {**GROUPED, "head_dim": 8},
    "mixtral": {**GROUPED, **MOE},
    "phi": {**SIZES, "partial_rotary_factor": 0.5},
    "stablelm": {**GROUPED, "partial_rotary_factor": 0.5},
    "gpt_neox": {**SIZES, "max_position_embeddings": 32},
    "falcon": {**SIZES, "num_kv_heads": 2, "new_decoder_architecture": True},
    "rwkv": {"hidden_size": 32, "attention_hidden_size": 32, "num_hidden_layers": 2, "context_length": 32, **TOKENS},
    "nemotron_h": {
        **GROUPED,
        "head_dim": 8,
        "layers_block_type": ["mamba", "attention"],
        "mamba_num_heads": 4,
        "mamba_head_dim": 16,
        "ssm_state_size": 8,
        "n_groups": 2,
        "chunk_size": 8,
    },
    "llama4": {
        "text_config": {
            **GROUPED,
            **MOE,
            "head_dim": 8,
            "intermediate_size_mlp": 48,
            "interleave_moe_layer_step": 1,
        },
        "vision_config": {**_VISION, **IMAGE, "vision_output_dim": 32, "projector_input_dim": 32},
    },
    "gemma4": {
        "text_config": {
            **GROUPED,
            "head_dim": 8,
            "global_head_dim": 8,
            "hidden_size_per_layer_input": 8,
            "vocab_size_per_layer_input": 64,
            "num_kv_shared_layers": 0,
        },
        "vision_config": {**_VISION, "head_dim": 8},
        "audio_config": None,
    },
    "blip-2": {
        "vision_config": {**_VISION, **IMAGE},
        "qformer_config": {**SIZES, "encoder_hidden_size": 32},
        "text_config": {
            **SIZES,
            "model_type": "opt",
            "ffn_dim": 48,
            "word_embed_proj_dim": 32,
            "max_position_embeddings": 64,
        },
        "num_query_tokens": 4,
        "image_token_index": 63,
    },
    "vit": {**_VISION, **IMAGE},
}
"""{model type: options of its config}; others take SIZES."""

DEFAULT_TYPES = [name for name in DEFAULT_TARGETS if name not in NOT_IN_TRANSFORMERS]


class UNet(nn.Module):
    """A convolutional U-Net as diffusion models have it: strided, grouped and transposed convolutions, attention over
    positions, a time embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.time = nn.Embedding(10, 16)
        self.conv_in = nn.Conv2d(3, 16, 3, padding=1)
        self.down = nn.Conv2d(16, 32, 3, stride=2, padding=1)
        self.depthwise = nn.Conv2d(32, 32, 3, padding=1, groups=32)
        self.to_time = nn.Linear(16, 32)
        self.norm = nn.GroupNorm(4, 32)
        self.attention = nn.MultiheadAttention(32, 4, batch_first=True)
        self.up = nn.ConvTranspose2d(32, 16, 2, stride=2)
        self.conv_out = nn.Conv2d(32, 3, 1)

    def forward(self, image: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
        first = self.conv_in(image)
        h = self.depthwise(self.down(first)) + self.to_time(self.time(step))[:, :, None, None]
        flat = self.norm(h).flatten(2).mT
        h = h + self.attention(flat, flat, flat, need_weights=False)[0].mT.reshape(h.shape)
        return self.conv_out(torch.cat([self.up(torch.nn.functional.silu(h)), first], dim=1))


Inputs = dict[str, Any]
EXTRA: dict[str, tuple[str, dict[str, Any]]] = {
    "vit": ("vit", {"target_modules": ["q_proj", "query", "projection"]}),
    "whisper": ("whisper", {"target_modules": ["q_proj", "conv1", "embed_tokens"]}),
    "bert, all linear and embeddings": ("bert", {"target_modules": r".*(query|dense|word_embeddings)"}),
    "t5, all linear and embeddings": ("t5", {"target_modules": ["q", "wo", "embed_tokens"]}),
    "mixtral experts": (
        "mixtral",
        {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]},
    ),
    "unet": (
        "unet",
        {"target_modules": ["time", "conv_in", "down", "depthwise", "to_time", "attention", "conv_out"]},
    ),
}
"""{name: (architecture, options of SORSAConfig)}"""


def tiny_model(architecture: str) -> nn.Module:
    """The frozen base model, in eval mode, always the same."""
    torch.manual_seed(0)
    if architecture == "unet":
        return UNet().eval().requires_grad_(False)
    config = CONFIG_MAPPING[architecture](**OPTIONS.get(architecture, SIZES))
    auto: Any = AutoModel
    if architecture == "llama4":  # as a causal LM it is its text part, which has another model type
        auto = AutoModelForImageTextToText
    elif architecture == "whisper":
        auto = AutoModelForSpeechSeq2Seq
    elif architecture in MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES:
        auto = AutoModelForSeq2SeqLM
    elif architecture in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        auto = AutoModelForCausalLM
    return auto.from_config(config).eval().requires_grad_(False)


def tiny_inputs(architecture: str, model: nn.Module) -> Inputs:
    """What its forward takes."""
    generator = torch.Generator().manual_seed(7)
    ids = torch.randint(3, 60, (2, 8), generator=generator)
    if architecture == "unet":
        return {"image": torch.randn(2, 3, 8, 8, generator=generator), "step": torch.tensor([1, 4])}
    images = torch.randn(2, 3, 16, 16, generator=generator)
    if architecture == "vit":
        return {"pixel_values": images}
    if architecture == "blip-2":
        return {"pixel_values": images, "input_ids": torch.cat([torch.full((2, 4), 63), ids], dim=1)}
    if architecture == "whisper":
        return {"input_features": torch.randn(2, 8, 20, generator=generator), "decoder_input_ids": ids}
    if isinstance(model, PreTrainedModel) and model.config.is_encoder_decoder:
        return {"input_ids": ids, "decoder_input_ids": ids}
    return {"input_ids": ids, "use_cache": False}  # RWKV's cache is written in place, which ends backpropagation


def first_output(model: Callable[..., Any], inputs: Inputs) -> torch.Tensor:
    """Logits, or the last hidden state."""
    output = model(**inputs)
    return output if isinstance(output, torch.Tensor) else output[0]
