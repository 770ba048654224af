"""Tiny random models of other architectures than the usual Llama, from configs. All are in eval mode."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GptOssConfig,
    GptOssForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MixtralConfig,
    MixtralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    SiglipVisionConfig,
    SiglipVisionModel,
    T5Config,
    T5ForConditionalGeneration,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

TOKENS = {"vocab_size": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
WIDTHS = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
SIZES = {**WIDTHS, "vocab_size": 64, "num_hidden_layers": 2, "num_key_value_heads": 2, "pad_token_id": 0}
VISION = {**WIDTHS, "image_size": 16, "patch_size": 8}


def made(model_class: type, config: Any, seed: int = 0) -> PreTrainedModel:
    torch.manual_seed(seed)
    return model_class(config).eval()


def tiny_gpt2(**changes: Any) -> GPT2LMHeadModel:
    """Conv1D layers and tied embeddings."""
    return made(GPT2LMHeadModel, GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=16, **changes))


def tiny_mixtral(layers: int = 2, experts: int = 4, **changes: Any) -> MixtralForCausalLM:
    """Experts that transformers fuses while it loads them."""
    sizes = {**SIZES, "num_hidden_layers": layers, "num_local_experts": experts, **changes}
    return made(MixtralForCausalLM, MixtralConfig(**sizes))


def tiny_gpt_oss(experts: int = 3) -> GptOssForCausalLM:
    """Experts stored (experts x in x out), as they are in the model."""
    sizes = {**SIZES, "intermediate_size": 24, "head_dim": 8, "num_local_experts": experts}
    return made(GptOssForCausalLM, GptOssConfig(**sizes, num_experts_per_tok=2))


def tiny_qwen3_moe(**changes: Any) -> Qwen3MoeForCausalLM:
    sizes = {**SIZES, **TOKENS, "head_dim": 8, "moe_intermediate_size": 24, **changes}
    return made(Qwen3MoeForCausalLM, Qwen3MoeConfig(**sizes, num_experts=4, num_experts_per_tok=2))


def tiny_deepseek() -> DeepseekV3ForCausalLM:
    """A dense layer beside one of experts."""
    sizes = {**WIDTHS, "vocab_size": 64, "moe_intermediate_size": 16, "num_hidden_layers": 2}
    heads = {"num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16}
    heads |= {"qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
    experts = {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 2}
    return made(DeepseekV3ForCausalLM, DeepseekV3Config(**sizes, **heads, **experts, first_k_dense_replace=1))


def tiny_opt() -> OPTForCausalLM:
    """Embedded positions."""
    sizes = {**WIDTHS, **TOKENS, "num_hidden_layers": 2, "ffn_dim": 48, "word_embed_proj_dim": 32}
    return made(OPTForCausalLM, OPTConfig(**sizes, max_position_embeddings=64))


def tiny_t5() -> T5ForConditionalGeneration:
    """In fp16, where transformers keeps some weights in fp32."""
    sizes = {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
    return made(T5ForConditionalGeneration, T5Config(**sizes)).half()


def tiny_whisper() -> WhisperForConditionalGeneration:
    """Convolutions and embedded positions; an encoder and a decoder."""
    sizes = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "decoder_start_token_id": 1}
    lengths = {"num_mel_bins": 8, "max_source_positions": 10, "max_target_positions": 16}
    return made(WhisperForConditionalGeneration, WhisperConfig(**sizes, **heads, **lengths, **TOKENS))


def tiny_siglip(layers: int = 1) -> SiglipVisionModel:
    """With an nn.MultiheadAttention."""
    return made(SiglipVisionModel, SiglipVisionConfig(**VISION, num_hidden_layers=layers))


def tiny_llava(vocab_size: int = 64, image_token: int = 63) -> LlavaForConditionalGeneration:
    """A text model in a larger one, whose weights are stored under other names."""
    vision = {**VISION, "model_type": "clip_vision_model", "num_hidden_layers": 1, "projection_dim": 32}
    text = {"model_type": "llama", **SIZES, "vocab_size": vocab_size}
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=image_token)
    return made(LlavaForConditionalGeneration, config)
