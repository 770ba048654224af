"""Tiny random models made from configs, in the place of the hub ids of PEFT's tests."""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import PreTrainedConfig

AUTO_CLASSES = (
    "AutoModel",
    "AutoModelForCausalLM",
    "AutoModelForSeq2SeqLM",
    "AutoModelForSequenceClassification",
    "AutoModelForTokenClassification",
)
TOKENS = {"vocab_size": 512, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    **TOKENS,
}
GROUPED = {**SIZES, "num_key_value_heads": 2}
GPT = {"n_positions": 128, "n_embd": 32, "n_layer": 2, "n_head": 4, **TOKENS}
OPT = {
    "hidden_size": 32,
    "ffn_dim": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "word_embed_proj_dim": 32,
    **TOKENS,
}
BART = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "max_position_embeddings": 128,
    **TOKENS,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "decoder_start_token_id": 2,
}
T5 = {
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 64,
    "num_layers": 2,
    "num_heads": 4,
    "decoder_start_token_id": 0,
    "vocab_size": 512,
    "pad_token_id": 0,
    "eos_token_id": 1,
}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
TWO_LABELS = {**SIZES, "num_labels": 2}

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "hf-internal-testing/tiny-random-Gemma3ForCausalLM": ("Gemma3TextConfig", {**GROUPED, "head_dim": 8}),
    "hf-internal-testing/tiny-random-MistralForCausalLM": ("MistralConfig", GROUPED),
    "hf-internal-testing/tiny-random-gpt2": ("GPT2Config", GPT),
    "peft-internal-testing/opt-125m": (  # tests count its layers and know its width
        "OPTConfig",
        {**OPT, "hidden_size": 768, "word_embed_proj_dim": 768, "num_hidden_layers": 12, "ffn_dim": 64},
    ),
    "peft-internal-testing/tiny-dummy-qwen2": ("Qwen2Config", GROUPED),
    "peft-internal-testing/tiny-random-BartForConditionalGeneration": ("BartConfig", BART),
    "peft-internal-testing/tiny-random-BertForSequenceClassification": ("BertConfig", TWO_LABELS),
    "peft-internal-testing/tiny-random-BertModel": ("BertConfig", SIZES),
    "peft-internal-testing/tiny-random-DebertaModel": ("DebertaConfig", SIZES),
    "peft-internal-testing/tiny-random-DebertaV2Model": ("DebertaV2Config", SIZES),
    "peft-internal-testing/tiny-random-GPT2LMHeadModel": ("GPT2Config", GPT),
    "peft-internal-testing/tiny-random-GPTJForCausalLM": ("GPTJConfig", {**GPT, "rotary_dim": 4}),
    "peft-internal-testing/tiny-random-OPTForCausalLM": ("OPTConfig", OPT),
    "peft-internal-testing/tiny-random-RobertaForSequenceClassification": ("RobertaConfig", TWO_LABELS),
    "peft-internal-testing/tiny-random-RobertaModel": ("RobertaConfig", SIZES),
    "peft-internal-testing/tiny-random-T5ForConditionalGeneration-calibrated": ("T5Config", T5),
    "trl-internal-testing/tiny-GptOssForCausalLM": ("GptOssConfig", {**GROUPED, "head_dim": 8, **EXPERTS}),
    "trl-internal-testing/tiny-Llama4ForCausalLM": (
        "Llama4TextConfig",
        {**GROUPED, "head_dim": 8, "intermediate_size_mlp": 64, "interleave_moe_layer_step": 1, **EXPERTS},
    ),
    "trl-internal-testing/tiny-LlamaForSequenceClassification-3.2": ("LlamaConfig", {**GROUPED, "num_labels": 2}),
    "trl-internal-testing/tiny-random-LlamaForCausalLM": ("LlamaConfig", GROUPED),
}
"""{hub id: name and options of the config that stands in}."""


def patch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let transformers' auto classes give the stand-in for a hub id; directories are loaded as ever."""
    for name in AUTO_CLASSES:
        auto = getattr(transformers, name)
        monkeypatch.setattr(auto, "from_pretrained", classmethod(_from_pretrained(auto, name)))


def _from_pretrained(auto: type, name: str) -> Any:
    original = auto.from_pretrained.__func__  # type: ignore[attr-defined]

    def from_pretrained(cls: type, where: Any, *args: Any, **kwargs: Any) -> Any:
        hub_id = str(where)
        if hub_id not in MODELS:
            return original(cls, where, *args, **kwargs)
        kwargs.pop("revision", None)
        model = original(cls, _saved(hub_id, name), *args, **kwargs)
        model.name_or_path = model.config._name_or_path = hub_id
        return model

    return from_pretrained


@cache
def _saved(hub_id: str, auto_name: str) -> str:
    """The directory of a stand-in, made where it is not there yet; each of several pytest processes has its own."""
    process = os.environ.get("PYTEST_XDIST_WORKER", "main")
    directory = Path(os.environ["PEFT_CONFORMANCE_MODELS"]) / process / hub_id.replace("/", "--") / auto_name
    if not (directory / "config.json").exists():
        name, options = MODELS[hub_id]
        config: PreTrainedConfig = getattr(transformers, name)(**options)
        with torch.random.fork_rng():  # tests seed before they load, and load twice
            torch.manual_seed(0)
            getattr(transformers, auto_name).from_config(config).save_pretrained(directory)
    return str(directory)
