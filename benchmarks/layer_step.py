"""One training step of an adapted linear layer, beside its peers, as a ratio to the frozen layer alone.

    python benchmarks/layer_step.py [--device cuda] [--repeats 20] [--processes 3]

The floor is the frozen base's forward and its gradient with respect to the input. Arithmetic limits over it:
1 + 5 r/d for SORSA, 1 + 3 r/d folded and for LoRA. On an accelerator bf16 under autocast, with the width of
Llama-2-7B added.
"""

from __future__ import annotations

from typing import Any

import torch
from common import publish
from peers import FOLDED, INTACT, LORA, PEERS
from steps import Row, charts, dtype_of, in_processes, measure, options_of, over_lora, table
from torch import nn

SHAPES = [(1024, 64, 1024), (1024, 16, 1024), (2048, 128, 512), (768, 8, 2048)]
"""(d, r, tokens): square weights d x d."""

LARGE = [(4096, 128, 2048), (4096, 16, 2048)]


class OneLayer(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.layer = nn.Linear(width, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)


def one_layer(width: int, rank: int, tokens: int, peers: Any, options: Any) -> Row:
    def base() -> nn.Module:
        torch.manual_seed(0)
        return OneLayer(width).to(options.device, dtype_of(options.device))

    x = torch.randn(tokens, width, device=options.device, dtype=dtype_of(options.device), requires_grad=True)
    row = measure(base, rank, x, lambda module, x: module(x), options, peers=peers)
    limits = {INTACT: 1 + 5 * rank / width, FOLDED: 1 + 3 * rank / width, LORA: 1 + 3 * rank / width}
    return {"label": f"d {width}, r {rank}, {tokens} tokens", "d": width, "tokens": tokens, "limits": limits, **row}


def main() -> None:
    options = options_of(__doc__, repeats=20)
    shapes = SHAPES if options.device == "cpu" else SHAPES + LARGE
    rows: list[Row] = []
    for shape in shapes:
        rows.append(in_processes(one_layer, *shape, PEERS, options=options))
        mean = {name: over_lora(rows, name) for name in PEERS if name in rows[0]["over LoRA"]}
        result = {"repeats": options.repeats, "processes": options.processes, "over LoRA": mean, "rows": rows}
        publish("layer_step", options.device, result, table("one layer", rows), charts("one layer", rows))


if __name__ == "__main__":
    main()
