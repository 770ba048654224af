"""One training step of an adapted linear layer (forward and backward), as a ratio to the frozen layer alone.

    python benchmarks/layer_step.py [--dtype bfloat16] [--repeats 30]

The floor is the frozen base's forward and its gradient with respect to the input. Arithmetic limit of SORSA's intact
form: 1 + 5 r/d.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
from typing import Any

import torch
from common import interleave, ratios, write
from peft import LoraConfig, get_peft_model
from rich.console import Console
from rich.table import Table
from torch import nn

from sorsa_plugin import SORSAConfig

SHAPES = [(1024, 64, 1024), (1024, 16, 1024), (2048, 128, 512), (768, 8, 2048)]
"""(d, r, tokens): square weights d x d."""


class Model(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.layer = nn.Linear(width, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)


def published_layer(width: int, rank: int) -> nn.Module:
    """The layer of PyPI's `sorsa` 1.0.1, by path: its package does not import with today's transformers."""
    path = importlib.metadata.distribution("sorsa").locate_file("sorsa/layer.py")
    specification = importlib.util.spec_from_file_location("published_sorsa_layer", str(path))
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    layer = module.Linear(width, width, r=rank, merge_weights=False)
    nn.init.normal_(layer.weight, std=width**-0.5)
    layer.sorsa_init()
    return layer


def contenders(width: int, rank: int, dtype: torch.dtype, device: str) -> dict[str, nn.Module]:
    def base() -> Model:
        torch.manual_seed(0)
        return Model(width).to(device, dtype)

    target: dict[str, Any] = {"r": rank, "target_modules": ["layer"]}
    frozen = base().requires_grad_(False)
    return {
        "frozen base": frozen,
        "PEFT LoRA": get_peft_model(base(), LoraConfig(lora_alpha=rank, **target)),
        "PEFT DoRA": get_peft_model(base(), LoraConfig(lora_alpha=rank, use_dora=True, **target)),
        "SORSA": get_peft_model(base(), SORSAConfig(**target)),
        "published SORSA layer": published_layer(width, rank).to(device, dtype),
    }


def step(module: nn.Module, x: torch.Tensor, gradient: torch.Tensor, autocast: bool) -> Any:
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]

    def run() -> None:
        x.grad = None
        for parameter in trained:
            parameter.grad = None
        with torch.autocast(x.device.type, torch.bfloat16, enabled=autocast):
            y = module(x)
        y.backward(gradient.to(y.dtype))

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--autocast", action="store_true", help="bf16 autocast around a float32 model")
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--name", default="layer_step")
    options = parser.parse_args()

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = getattr(torch, options.dtype)
    table = Table(title="training step of one layer / frozen base (median of interleaved repeats)")
    rows = []
    for width, rank, tokens in SHAPES:
        x = torch.randn(tokens, width, device=device, dtype=dtype, requires_grad=True)
        gradient = torch.randn(tokens, width, device=device, dtype=dtype)
        modules = contenders(width, rank, dtype, device)
        times = interleave(
            {name: step(module, x, gradient, options.autocast) for name, module in modules.items()}, options.repeats
        )
        row = ratios(times, "frozen base")
        limit = 1 + 5 * rank / width
        rows.append({"d": width, "r": rank, "tokens": tokens, "limit": limit, "ratios": row})
        if not table.columns:
            for column in ("d, r, tokens", "limit", *modules):
                table.add_column(column, justify="right")
        table.add_row(f"{width}, {rank}, {tokens}", f"{limit:.2f}", *(f"{row[name]['median']:.2f}" for name in modules))
    Console().print(table)
    against = torch.tensor([row["ratios"]["SORSA"]["median"] / row["ratios"]["PEFT LoRA"]["median"] for row in rows])
    mean = float(against.log().mean().exp())
    print(f"SORSA / PEFT LoRA, geometric mean over the shapes: {mean:.3f}")
    write(options.name, {"dtype": options.dtype, "autocast": options.autocast, "rows": rows, "sorsa_over_lora": mean})


if __name__ == "__main__":
    main()
