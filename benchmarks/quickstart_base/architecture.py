"""The shape, the first weights, the optimizers and the saving of the quickstart base model."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast


@dataclass(frozen=True)
class Settings:
    """Everything that decides what comes out, besides the time allowed."""

    seed: int = 0
    vocab_size: int = 768
    hidden: int = 128
    layers: int = 4
    heads: int = 4
    inner: int = 384
    tokens_per_batch: int = 2000
    peak_rate: float = 3e-3
    matrix_rate: float = 0.02
    prompt_weight: float = 0.03
    recall_share: float = 0.04


def build_model(settings: Settings, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A small Llama with freshly drawn weights."""
    torch.manual_seed(settings.seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=settings.hidden,
        intermediate_size=settings.inner,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        num_key_value_heads=settings.heads,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        initializer_range=0.04,
    )
    model = LlamaForCausalLM(config)
    start_looking_back(model, heads=2)
    model.generation_config.do_sample = False
    model.generation_config.max_new_tokens = 64
    return model


@torch.no_grad()
def start_looking_back(model: LlamaForCausalLM, heads: int) -> None:
    """Lets head n of the first layer attend to the token n + 1 places back from the start.

    Copying from the context is built on such heads, and a small model spends most of a short training on finding
    them. Every embedding gets the same constant part; queries and keys read it, and a rotary turn by the distance
    makes their product largest there. Nothing keeps the heads so: they are trained like all others.
    """
    attention, table = model.model.layers[0].self_attn, model.model.embed_tokens.weight
    size, width = attention.head_dim, table.shape[1]
    constant = torch.where(torch.rand(width) < 0.5, -1.0, 1.0)
    table.add_(table.std() * constant)
    turns = 10000.0 ** (-torch.arange(0, size, 2) / size)
    weight = torch.where(turns > 0.1, 1.0, 0.3)
    for head in range(heads):
        query = torch.cat([weight, torch.zeros(size // 2)])
        key = torch.cat([weight * torch.cos((head + 1) * turns), weight * torch.sin((head + 1) * turns)])
        rows = slice(head * size, (head + 1) * size)
        for linear, direction in ((attention.q_proj, query), (attention.k_proj, key)):
            linear.weight[rows].mul_(0.1).add_(7.5 * 2**0.5 / width * torch.outer(direction, constant))


def build_optimizers(model: LlamaForCausalLM, settings: Settings) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the layers, which learns to look up much sooner, and AdamW for the rest."""
    inside = {id(p) for p in model.model.layers.parameters() if p.dim() == 2}
    matrices = [p for p in model.parameters() if id(p) in inside]
    others = [p for p in model.parameters() if id(p) not in inside]
    inner = {"params": matrices, "peak": settings.matrix_rate}
    outer = {"params": others, "peak": settings.peak_rate}
    return [
        torch.optim.Muon([inner], weight_decay=0.05),
        torch.optim.AdamW([outer], betas=(0.9, 0.98), weight_decay=0.0),
    ]


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Writes the model in bfloat16 and the tokenizer, replacing the folder in one go."""
    part = out.with_name(out.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    copy = LlamaForCausalLM(model.config).to(torch.bfloat16)
    copy.load_state_dict(model.state_dict())
    copy.generation_config = model.generation_config
    copy.save_pretrained(part)
    tokenizer.save_pretrained(part)
    for file in part.iterdir():
        file.chmod(0o644)  # safetensors writes files that only their owner may read
    shutil.rmtree(out, ignore_errors=True)
    part.rename(out)
