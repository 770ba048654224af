"""One training step (forward and backward) of every peer side by side, as a ratio to the frozen base's: what
`layer_step`, `model_step` and `scaling` share."""

from __future__ import annotations

import argparse
import gc
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from statistics import geometric_mean, median
from typing import Any

import torch
from common import Chart, Table, arguments, interleave, ratios, spread
from memory import peak_memory, saved_activations
from peers import FLOOR, FOLDED, INTACT, LORA, PEERS, build, installed
from torch import nn

Forward = Callable[[nn.Module, torch.Tensor], torch.Tensor]

Row = dict[str, Any]
"""What `measure` found, and the label and limits of what was measured."""


def options_of(doc: str | None, repeats: int) -> argparse.Namespace:
    """What `arguments` knows, and --processes: 3 on a CPU."""
    parser = arguments(doc, repeats)
    parser.add_argument("--processes", type=int)
    options = parser.parse_args()
    options.processes = options.processes or (3 if options.device == "cpu" else 1)
    return options


def in_processes(row: Callable[..., Row], *what: Any, options: Any) -> Row:
    """`row(*what, options)` in fresh processes, one after another, because where its memory lies moves all ratios of a
    process by 1 to 2%, however often it repeats: medians of the processes' medians and quartiles; "over LoRA" lists
    each process's median.
    """
    rows = []
    for _ in range(options.processes):
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            rows.append(pool.submit(row, *what, options).result())
    found = dict(rows[0])
    for key in ("ratios", "seconds"):
        found[key] = {
            name: {part: median(other[key][name][part] for other in rows) for part in spreads}
            for name, spreads in found[key].items()
        }
    found["over LoRA"] = {name: [other["over LoRA"][name] for other in rows] for name in found["over LoRA"]}
    return found


def dtype_of(device: str) -> torch.dtype:
    """Of base weights and inputs: bf16 under bf16 autocast on an accelerator, plain fp32 elsewhere."""
    return torch.float32 if device == "cpu" else torch.bfloat16


def measure(
    base: Callable[[], nn.Module],
    rank: int,
    x: torch.Tensor,
    forward: Forward,
    options: Any,
    *,
    peers: Sequence[str] = PEERS,
    interleaved: bool = True,
) -> Row:
    """Times, ratios to the frozen base and memory of every peer.

    Args:
        base: makes the model that every peer gets for itself.
        x: input that needs a gradient, as behind a trained layer.
        interleaved: all peers take turns; otherwise one is built at a time, for models that do not fit together.
    """
    present = [name for name in peers if installed(name)]
    times: dict[str, list[float]] = {}
    memory: dict[str, dict[str, int]] = {}
    for group in [present] if interleaved else [[peer] for peer in present]:
        try:
            steps = {}
            for name in group:
                steps[name], saved = prepare(build(name, base, rank), x, forward, options.device)
                memory[name] = {"kept": saved, "peak": peak_memory(steps[name], options.device)}
            times |= interleave(steps, options.repeats)
        except torch.OutOfMemoryError:
            if interleaved:
                raise
            memory.pop(group[0], None)
        del steps
        gc.collect()
        if options.device == "cuda":
            torch.cuda.empty_cache()
    seconds = {name: spread(values) for name, values in times.items()}
    paired = ratios(times, LORA) if LORA in times else {}
    over = {name: found["median"] for name, found in paired.items()}
    over_floor = ratios(times, FLOOR) if FLOOR in times else {}
    return {"r": rank, "ratios": over_floor, "over LoRA": over, "seconds": seconds, "bytes": memory}


def prepare(module: nn.Module, x: torch.Tensor, forward: Forward, device: str) -> tuple[Callable[[], None], int]:
    """A training step, and the bytes that its forward keeps."""
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]

    def output() -> torch.Tensor:
        with torch.autocast(device, torch.bfloat16, enabled=device != "cpu"):
            return forward(module, x)

    def step() -> None:
        x.grad = None
        for parameter in trained:
            parameter.grad = None
        y = output()
        y.backward(torch.ones_like(y))

    return step, saved_activations(output, module)


def over_lora(rows: list[Row], name: str) -> float:
    """Geometric mean over the rows of the time over LoRA's in the same repeat, a median of processes and repeats."""
    return geometric_mean(median(row["over LoRA"][name]) for row in rows)


def table(title: str, rows: list[Row]) -> Table:
    """A line a peer; rows have a "label" and, for single layers, "limits" of some peers."""

    def cell(row: Row, name: str) -> str:
        if name not in row["ratios"]:
            return "out of memory" if installed(name) else "not installed"
        return "{median:.2f} ({low:.2f}-{high:.2f})".format(**row["ratios"][name])

    lines = [
        [f"limit {name}", *(f"{row['limits'][name]:.2f}" for row in rows), "", "", ""]
        for name in (LORA, INTACT, FOLDED)
        if "limits" in rows[0]
    ]
    for name in PEERS:
        ran = [row for row in rows if name in row["ratios"] and LORA in row["ratios"]]
        memory = [max(r["bytes"][name][k] / r["bytes"][LORA][k] for r in ran) for k in ("kept", "peak")] if ran else []
        summary = [f"{over_lora(ran, name):.3f}", *(f"{value:.2f}" for value in memory)] if ran else [""] * 3
        lines.append([name, *(cell(row, name) for row in rows), *summary])
    columns = ["", *(row["label"] for row in rows), "/ LoRA (geo. mean)", "kept / LoRA (max)", "peak / LoRA (max)"]
    return Table(f"{title}, time / frozen base: median (quartiles)", columns, lines)


def charts(title: str, rows: list[Row]) -> list[Chart]:
    labels = [row["label"].replace(", ", "\n") for row in rows]
    names = [name for name in PEERS if all(name in row["ratios"] for row in rows)]
    times = {name: [row["ratios"][name]["median"] for row in rows] for name in names}
    peaks = {name: [row["bytes"][name]["peak"] / 2**20 for row in rows] for name in names}
    return [
        Chart(title, "time / frozen base", labels, times),
        Chart("memory of a step beyond the weights", "MiB at the peak", labels, peaks),
    ]
