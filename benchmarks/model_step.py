"""One training step of a whole model (forward, loss, backward) with every linear adapted, beside its peers.

    python benchmarks/model_step.py                  small Llama and Qwen shapes, fp32
    python benchmarks/model_step.py --device cuda    Llama-2-7B and Qwen3-0.6B shapes, bf16 under autocast, r 128 and 16

Weights are random. On the CPU all peers take turns; on an accelerator, whose clock is steady and which would not hold
them all, one is built at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from common import publish
from steps import Row, charts, dtype_of, in_processes, measure, options_of, table
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM


def llama(hidden: int, layers: int, heads: int, intermediate: int, vocabulary: int) -> nn.Module:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=hidden,
            intermediate_size=intermediate,
            num_hidden_layers=layers,
            num_attention_heads=heads,
        )
    )


def qwen(hidden: int, layers: int, heads: int, intermediate: int, vocabulary: int, head_dim: int) -> nn.Module:
    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=vocabulary,
            hidden_size=hidden,
            intermediate_size=intermediate,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=heads // 2,
            head_dim=head_dim,
            tie_word_embeddings=True,
        )
    )


Model = tuple[Callable[[], nn.Module], int, int]

MODELS: dict[str, dict[str, Model]] = {
    "cpu": {
        "small Llama": (lambda: llama(512, 4, 8, 1408, 2048), 2, 256),
        "small Qwen": (lambda: qwen(512, 4, 8, 1536, 4096, 64), 2, 256),
    },
    "cuda": {
        "Llama-2-7B": (lambda: llama(4096, 32, 32, 11008, 32000), 1, 2048),
        "Qwen3-0.6B": (lambda: qwen(1024, 28, 16, 3072, 151936, 128), 4, 1024),
    },
}
"""Per device: name -> (model, rows, tokens a row)."""

RANKS = {"cpu": (32,), "cuda": (128, 16)}


def one_model(name: str, rank: int, options: Any) -> Row:
    make, batch, length = MODELS[options.device][name]
    ids = torch.randint(1, 2000, (batch, length), generator=torch.Generator().manual_seed(0)).to(options.device)

    def base() -> nn.Module:
        torch.manual_seed(0)
        with torch.device(options.device):
            return make().to(dtype_of(options.device)).train()

    def loss(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return module(inputs_embeds=x, labels=ids).loss

    embed = base().get_input_embeddings()  # type: ignore[operator]
    x = embed(ids).detach().requires_grad_()
    row = measure(base, rank, x, loss, options, interleaved=options.device == "cpu")
    return {"label": f"{name}, r {rank}", "tokens": batch * length, **row}


def main() -> None:
    options = options_of(__doc__, repeats=16)
    models, ranks = MODELS[options.device], RANKS[options.device]
    rows: list[Row] = []
    for name in models:
        for rank in ranks:
            rows.append(in_processes(one_model, name, rank, options=options))
            result = {"repeats": options.repeats, "processes": options.processes, "rows": rows}
            publish("model_step", options.device, result, table("a whole model", rows), charts("a whole model", rows))


if __name__ == "__main__":
    main()
