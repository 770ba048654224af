"""A training step of one layer in nf4, and its memory, beside QLoRA's.

python benchmarks/quantization_step.py [--device cuda] [--repeats 15]
"""

from __future__ import annotations

from typing import Any

import torch
from bitsandbytes.nn import Linear4bit
from common import Chart, Table, arguments, interleave, publish, ratios, spread
from memory import peak_memory
from peft import LoraConfig, get_peft_model
from steps import prepare
from torch import nn

from sorsa_plugin import SORSAConfig, quantize_residual

SHAPES = [(1024, 16, 512), (1024, 64, 512), (2048, 64, 256)]
"""Width, rank and tokens of the layers."""


class One(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.proj = Linear4bit(width, width, bias=False, quant_type="nf4")
        self.full = self.proj.weight.data.clone()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.proj(x)


def peers(width: int, rank: int, device: str) -> dict[str, nn.Module]:
    def base() -> One:
        return One(width).to(device)

    options: dict[str, Any] = {"r": rank, "target_modules": ["proj"]}
    full = One(width).full
    return {
        "frozen nf4": base().requires_grad_(False),
        "QLoRA": get_peft_model(base(), LoraConfig(lora_alpha=rank, **options)),
        "SORSA on nf4": get_peft_model(base(), SORSAConfig(**options)),
        "QSORSA": quantize_residual(base(), SORSAConfig(**options), {"proj.weight": full}),
    }


def measure(width: int, rank: int, tokens: int, options: Any) -> dict[str, Any]:
    models = {name: model.train() for name, model in peers(width, rank, options.device).items()}
    steps = {}
    for name, model in models.items():
        x = torch.randn(1, tokens, width, device=options.device).requires_grad_()
        steps[name], _ = prepare(model, x, lambda module, x: module(x), options.device)
    times = interleave(steps, options.repeats)
    over = ratios(times, "QLoRA")
    return {
        "width": width,
        "rank": rank,
        "tokens": tokens,
        "peers": {
            name: {
                "seconds": spread(times[name])["median"],
                "ratio": over[name],
                "peak bytes": peak_memory(steps[name], options.device),
                "trained bytes": sum(p.numel() * 4 for p in models[name].parameters() if p.requires_grad),
                "frozen fp32 bytes": sum(b.numel() * 4 for n, b in models[name].named_buffers() if "sorsa" in n),
            }
            for name in steps
        },
    }


def table(rows: list[dict[str, Any]]) -> Table:
    lines = [
        [
            f"{row['width']}, {row['rank']}, {row['tokens']}",
            name,
            f"{peer['seconds'] * 1e3:.1f}",
            f"{peer['ratio']['median']:.2f}",
            *(f"{peer[key] / 2**20:.2f}" for key in ("peak bytes", "trained bytes", "frozen fp32 bytes")),
        ]
        for row in rows
        for name, peer in row["peers"].items()
    ]
    columns = ["d, r, tokens", "layer", "ms", "x QLoRA", "peak MiB", "trained MiB", "frozen fp32 MiB"]
    return Table("a training step of one nf4 layer", columns, lines)


def charts(rows: list[dict[str, Any]]) -> list[Chart]:
    labels = [f"d {row['width']}, r {row['rank']}\n{row['tokens']} tokens" for row in rows]
    names = list(rows[0]["peers"])
    times = {name: [row["peers"][name]["ratio"]["median"] for row in rows] for name in names}
    peaks = {name: [row["peers"][name]["peak bytes"] / 2**20 for row in rows] for name in names}
    return [
        Chart("a training step of one nf4 layer", "time / QLoRA", labels, times),
        Chart("memory of a step beyond the weights", "MiB at the peak", labels, peaks),
    ]


def main() -> None:
    options = arguments(__doc__, repeats=15).parse_args()
    rows = [measure(*shape, options) for shape in SHAPES]
    publish("quantization_step", options.device, {"repeats": options.repeats, "rows": rows}, table(rows), charts(rows))


if __name__ == "__main__":
    main()
