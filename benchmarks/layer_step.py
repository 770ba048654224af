"""One training step of an adapted linear layer (forward and backward), as a ratio to the frozen layer alone.

    python benchmarks/layer_step.py [--device cuda] [--dtype bfloat16] [--autocast] [--repeats 30]

The floor is the frozen base's forward and its gradient with respect to the input. Arithmetic limits over it:
1 + 5 r/d intact, 1 + 3 r/d folded and for LoRA. Also the peak of live tensors and what is saved for backward.
"""

from __future__ import annotations

from typing import Any

import torch
from common import (
    Chart,
    Table,
    arguments,
    geometric_mean,
    interleave,
    peak_memory,
    publish,
    ratios,
    saved_activations,
    training_step,
)
from peers import FLOOR, FOLDED, INTACT, LORA, PEERS, build
from torch import nn

SHAPES = [(1024, 64, 1024), (1024, 16, 1024), (2048, 128, 512), (768, 8, 2048)]
"""(d, r, tokens): square weights d x d."""


class OneLayer(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.layer = nn.Linear(width, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)


def measure(width: int, rank: int, tokens: int, options: Any) -> dict[str, Any]:
    dtype = getattr(torch, options.dtype)

    def base() -> nn.Module:
        torch.manual_seed(0)
        return OneLayer(width).to(options.device, dtype)

    x = torch.randn(tokens, width, device=options.device, dtype=dtype, requires_grad=True)
    modules = {name: build(name, base, rank, ["layer"]) for name in PEERS}
    steps = {}
    for name, module in modules.items():

        def forward(module: nn.Module = module) -> torch.Tensor:
            x.grad = None
            return module(x)

        steps[name] = training_step(module, forward, options.autocast)
    with torch.autocast(options.device, torch.bfloat16, enabled=options.autocast):
        saved = {name: saved_activations(lambda m=module: m(x), module) for name, module in modules.items()}
    return {
        "d": width,
        "r": rank,
        "tokens": tokens,
        "limits": {INTACT: 1 + 5 * rank / width, FOLDED: 1 + 3 * rank / width, LORA: 1 + 3 * rank / width},
        "ratios": ratios(interleave(steps, options.repeats), FLOOR),
        "peak_bytes": {name: peak_memory(step, options.device) for name, step in steps.items()},
        "saved_bytes": saved,
    }


def over_lora(rows: list[dict[str, Any]], name: str) -> float:
    return geometric_mean([row["ratios"][name]["median"] / row["ratios"][LORA]["median"] for row in rows])


def tables(result: dict[str, Any]) -> list[Table]:
    rows = result["rows"]
    shape = [f"{row['d']}, {row['r']}, {row['tokens']}" for row in rows]
    names = [name for name in PEERS if name != FLOOR]
    times = [
        [label, f"{row['limits'][INTACT]:.2f}, {row['limits'][FOLDED]:.2f}"]
        + [f"{row['ratios'][name]['median']:.2f}" for name in names]
        for label, row in zip(shape, rows, strict=True)
    ]
    mean = ["geometric mean, over LoRA", ""] + [f"{over_lora(rows, name):.3f}" for name in names]
    memory = [
        [label, *(f"{row[kind][name] / 2**20:.1f}" for kind in ("saved_bytes", "peak_bytes") for name in names[:4])]
        for label, row in zip(shape, rows, strict=True)
    ]
    return [
        Table(
            "training step of one layer / frozen base (median)",
            ["d, r, tokens", "limit intact, folded", *names],
            [*times, mean],
        ),
        Table(
            "MiB kept for backward, then MiB at the peak of a step",
            ["d, r, tokens", *(f"{what} {name}" for what in ("kept", "peak") for name in names[:4])],
            memory,
        ),
    ]


def charts(result: dict[str, Any]) -> list[Chart]:
    shape = [f"{row['d']}, {row['r']}, {row['tokens']}" for row in result["rows"]]
    series = {name: [row["ratios"][name]["median"] for row in result["rows"]] for name in PEERS if name != FLOOR}
    return [Chart("training step of one layer (d, r, tokens)", "time / frozen base", shape, series)]


def main() -> None:
    parser = arguments(__doc__, repeats=20)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--autocast", action="store_true", help="bf16 autocast around the layer")
    options = parser.parse_args()
    rows = [measure(*shape, options) for shape in SHAPES]
    result = {
        "dtype": options.dtype,
        "autocast": options.autocast,
        "repeats": options.repeats,
        "rows": rows,
        "over_lora": {name: over_lora(rows, name) for name in PEERS},
    }
    publish("layer_step", options.device, result, tables(result), charts(result))


if __name__ == "__main__":
    main()
