"""The model of most tests: a random Llama of two blocks, and rows of random tokens for it."""

from __future__ import annotations

import torch
from transformers import LlamaConfig, LlamaForCausalLM


def tiny_llama(
    dtype: torch.dtype = torch.float32, seed: int = 0, layers: int = 2, hidden: int = 32, intermediate: int = 48
) -> LlamaForCausalLM:
    """A random Llama with all seven projections, tall, wide and square."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config).to(dtype).eval()


def token_batches(count: int, length: int = 9, seed: int = 0) -> list[dict[str, torch.Tensor]]:
    """Language-modelling examples of random tokens, for a Trainer."""
    ids = torch.randint(1, 64, (count, length), generator=torch.Generator().manual_seed(seed))
    return [{"input_ids": row, "labels": row} for row in ids]
