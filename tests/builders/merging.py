"""Tiny models, trained adapters and what is on disk, shared by the tests of merging into files."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from builders.one_layer import perturb
from sorsa_plugin import SORSAConfig

INDEX = "model.safetensors.index.json"
FILE, CONFIG = "adapter_model.safetensors", "adapter_config.json"
TOKENS = torch.randint(1, 64, (2, 9), generator=torch.Generator().manual_seed(7))
SMALL = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "pad_token_id": 0}


def llama(tied: bool = False, dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    torch.manual_seed(4)
    config = LlamaConfig(**SMALL, num_hidden_layers=2, num_key_value_heads=2, tie_word_embeddings=tied)
    return LlamaForCausalLM(config).to(dtype).eval()


def gpt2() -> GPT2LMHeadModel:
    """Conv1D layers and tied embeddings."""
    torch.manual_seed(2)
    return GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=16)).eval()


def mixtral() -> MixtralForCausalLM:
    """Experts that transformers fuses while it loads them."""
    torch.manual_seed(3)
    config = MixtralConfig(**SMALL, num_hidden_layers=2, num_key_value_heads=2, num_local_experts=4)
    return MixtralForCausalLM(config).eval()


def trained(base, scale: float = 0.1, **options) -> PeftModel:
    """A model with an adapter that has moved, in eval mode; modules_to_save and trained tokens have moved too."""
    model = get_peft_model(base, SORSAConfig(**{"r": 3, "target_modules": "all-linear", **options}))
    perturb(model, scale=scale)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save.default" in name or "trainable_tokens_delta" in name:
                parameter.mul_(1.5)
    return model.eval()


def digests(directory: Path) -> dict[str, str]:
    return {
        str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


def stored(directory: Path) -> dict[str, dict[str, torch.Tensor]]:
    return {path.name: load_file(path) for path in sorted(directory.glob("model*.safetensors"))}


def save_base(directory: Path) -> Path:
    """`llama` in shards."""
    llama().save_pretrained(directory, max_shard_size="20KB")
    return directory


def save_adapter(directory: Path) -> Path:
    """An adapter of rank 3 on the 14 projections of `save_base`."""
    trained(llama()).save_pretrained(directory)
    return directory
