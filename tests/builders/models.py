"""Tiny random models of other architectures than the usual Llama, from configs."""

from __future__ import annotations

import torch
from transformers import LlamaConfig, LlamaForCausalLM


def tied_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, tie_word_embeddings=True)).eval()
