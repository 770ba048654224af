"""The model of most tests: a random Llama of two blocks, and rows of random tokens for it."""

from __future__ import annotations

from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

TOKENS = torch.randint(1, 64, (2, 9), generator=torch.Generator().manual_seed(7))
"""Two rows of random tokens."""


def tiny_llama(
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    layers: int = 2,
    hidden: int = 32,
    intermediate: int = 48,
    **changes: Any,
) -> LlamaForCausalLM:
    """A random Llama with all seven projections, tall, wide and square; `changes` are of its config."""
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
        **changes,
    )
    return LlamaForCausalLM(config).to(dtype).eval()


def tied_llama(dtype: torch.dtype = torch.float32, **changes: Any) -> LlamaForCausalLM:
    """`tiny_llama` whose output layer is its embedding."""
    return tiny_llama(dtype, tie_word_embeddings=True, **changes)


def token_batches(count: int, length: int = 9, seed: int = 0) -> list[dict[str, torch.Tensor]]:
    """Language-modelling examples of random tokens, for a Trainer."""
    ids = torch.randint(1, 64, (count, length), generator=torch.Generator().manual_seed(seed))
    return [{"input_ids": row, "labels": row} for row in ids]
