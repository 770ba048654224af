"""One training step of a whole model (forward, loss, backward) with every linear adapted.

    python benchmarks/model_step.py                  small Llama and Qwen shapes, fp32
    python benchmarks/model_step.py --device cuda    Llama-2-7B and Qwen3-0.6B shapes, bf16 under autocast, r 16 and 128

Weights are random. On the CPU all peers take turns; on an accelerator, which is not shared, one model is there at a
time.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import torch
from common import (
    Chart,
    Table,
    arguments,
    interleave,
    peak_memory,
    publish,
    ratios,
    saved_activations,
    spread,
    timed,
    training_step,
)
from peers import FLOOR, LORA, PEERS, build
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
            num_key_value_heads=heads,
        )
    )


def qwen(hidden: int, layers: int, heads: int, intermediate: int, vocabulary: int) -> nn.Module:
    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=vocabulary,
            hidden_size=hidden,
            intermediate_size=intermediate,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=heads // 2,
            head_dim=128 if hidden >= 1024 else 64,
        )
    )


MODELS: dict[str, dict[str, tuple[Callable[[], nn.Module], int, int]]] = {
    "cpu": {
        "small Llama": (lambda: llama(512, 4, 8, 1408, 2048), 4, 256),
        "small Qwen": (lambda: qwen(512, 4, 8, 1536, 4096), 4, 256),
    },
    "cuda": {
        "Llama-2-7B": (lambda: llama(4096, 32, 32, 11008, 32000), 1, 2048),
        "Qwen3-0.6B": (lambda: qwen(1024, 28, 16, 3072, 151936), 4, 1024),
    },
}
"""Per device: name -> (model, rows, tokens a row)."""


def measure(kind: str, rank: int, options: Any) -> dict[str, Any]:
    make, batch, length = MODELS[options.device][kind]
    dtype = torch.float32 if options.device == "cpu" else torch.bfloat16
    autocast = options.device != "cpu"
    ids = torch.randint(1, 2000, (batch, length), generator=torch.Generator().manual_seed(0)).to(options.device)

    def base() -> nn.Module:
        torch.manual_seed(0)
        with torch.device(options.device):
            return make().to(dtype).train()

    # the first layer's input must need a gradient, as behind a trained adapter it does in every layer but the first
    def forward_of(model: nn.Module) -> Callable[[], torch.Tensor]:
        embedded = model.get_input_embeddings()(ids).detach().requires_grad_()
        return lambda: model(inputs_embeds=embedded, labels=ids).loss

    times: dict[str, list[float]] = {}
    memory: dict[str, dict[str, int]] = {}
    steps: dict[str, Callable[[], None]] = {}
    for name in PEERS:
        model = build(name, base, rank, "all-linear")
        forward = forward_of(model)
        step = training_step(model, forward, autocast)
        with torch.autocast(options.device, torch.bfloat16, enabled=autocast):
            saved = saved_activations(forward, model)
        memory[name] = {"peak": peak_memory(step, options.device), "saved": saved}
        if options.device == "cpu":
            steps[name] = step
        else:
            times[name] = [timed(step) for _ in range(options.repeats + 2)][2:]
            del model, forward, step
            gc.collect()
            torch.cuda.empty_cache()
    if steps:
        times = interleave(steps, options.repeats, warmup=1)
    over = ratios(times, FLOOR) if steps else {n: spread([t / min(times[FLOOR]) for t in v]) for n, v in times.items()}
    return {
        "model": kind,
        "r": rank,
        "tokens": batch * length,
        "seconds": {name: spread(values) for name, values in times.items()},
        "ratios": over,
        "memory": memory,
    }


def tables(result: dict[str, Any]) -> list[Table]:
    found = []
    for row in result["rows"]:
        lines = []
        for name in PEERS:
            over = row["ratios"][name]["median"]
            lines.append(
                [
                    name,
                    f"{row['seconds'][name]['median'] * 1e3:.0f}",
                    f"{over:.2f}",
                    f"{over / row['ratios'][LORA]['median']:.2f}",
                    f"{row['memory'][name]['saved'] / 2**20:.0f}",
                    f"{row['memory'][name]['peak'] / 2**20:.0f}",
                ]
            )
        columns = ["", "ms a step", "/ frozen base", "/ LoRA", "MiB kept for backward", "MiB at the peak"]
        found.append(Table(f"{row['model']} shape, r {row['r']}, {row['tokens']} tokens", columns, lines))
    return found


def charts(result: dict[str, Any]) -> list[Chart]:
    names = [f"{row['model']}, r {row['r']}" for row in result["rows"]]
    series = {name: [row["ratios"][name]["median"] for row in result["rows"]] for name in PEERS if name != FLOOR}
    peaks = {name: [row["memory"][name]["peak"] / 2**20 for row in result["rows"]] for name in PEERS}
    return [
        Chart("training step of a model", "time / frozen base", names, series),
        Chart("peak of live tensors in a step, beyond the weights", "MiB", names, peaks),
    ]


def main() -> None:
    options = arguments(__doc__, repeats=8).parse_args()
    ranks = (32,) if options.device == "cpu" else (128, 16)
    rows = [measure(kind, rank, options) for kind in MODELS[options.device] for rank in ranks]
    result = {"repeats": options.repeats, "rows": rows}
    publish("model_step", options.device, result, tables(result), charts(result))


if __name__ == "__main__":
    main()
