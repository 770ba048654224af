"""What every benchmark shares: interleaved timing, memory, tables, charts, and result files that say where they come
from."""

from __future__ import annotations

import argparse
import gc
import importlib.metadata
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table as RichTable
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

RESULTS = Path(__file__).parent / "results"


class Table(NamedTuple):
    title: str
    columns: list[str]
    rows: list[list[str]]


class Chart(NamedTuple):
    """Bars over names, or lines over numbers."""

    title: str
    ylabel: str
    x: list[Any]
    series: dict[str, list[float]]
    xlabel: str = ""


def arguments(doc: str | None, repeats: int) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--repeats", type=int, default=repeats)
    return parser


def machine(device: str) -> dict[str, Any]:
    """Processor or accelerator, threads, load, versions and date of this run."""
    processor = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        processor = next(
            (line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")),
            processor,
        )
    versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers", "peft", "sorsa-plugin")}
    return {
        "processor": processor,
        "threads": torch.get_num_threads(),
        "load average": round(os.getloadavg()[0], 1),
        "accelerator": torch.cuda.get_device_name() if device == "cuda" else None,
        "versions": versions,
        "date": date.today().isoformat(),
    }


def synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def timed(function: Callable[[], Any]) -> float:
    synchronise()
    start = time.perf_counter()
    function()
    synchronise()
    return time.perf_counter() - start


def interleave(functions: dict[str, Callable[[], Any]], repeats: int, warmup: int = 2) -> dict[str, list[float]]:
    """Seconds of each call, all functions in turn in every repeat, so that a slow minute slows them alike."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for repeat in range(-warmup, repeats):
        for name, function in functions.items():
            seconds = timed(function)
            if repeat >= 0:
                times[name].append(seconds)
    return times


def spread(values: list[float]) -> dict[str, float]:
    """Median and quartiles."""
    low, middle, high = statistics.quantiles(values, n=4) if len(values) > 1 else values * 3
    return {"median": middle, "low": low, "high": high}


def ratios(times: dict[str, list[float]], floor: str) -> dict[str, dict[str, float]]:
    """Spread of the per-repeat ratios to `floor`."""
    return {
        name: spread([value / base for value, base in zip(values, times[floor], strict=True)])
        for name, values in times.items()
    }


def geometric_mean(values: list[float]) -> float:
    return statistics.geometric_mean(values)


def training_step(module: nn.Module, forward: Callable[[], torch.Tensor], autocast: bool) -> Callable[[], None]:
    """Forward and backward of a scalar or of an output with the gradient that is set as its `gradient`."""
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    device = next(module.parameters()).device.type

    def run() -> None:
        for parameter in trained:
            parameter.grad = None
        with torch.autocast(device, torch.bfloat16, enabled=autocast):
            output = forward()
        output.backward(torch.ones_like(output))

    return run


def peak_memory(step: Callable[[], Any], device: str) -> int:
    """Most bytes of tensors alive during a call beyond those alive before it.

    On the CPU autograd adds gradients out of place while it is watched, so that a step seems to need one input
    gradient more than it does, whatever the method.
    """
    step()
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return torch.cuda.max_memory_allocated() - before
    with _LiveTensors() as live:
        step()
    return live.peak


def saved_activations(forward: Callable[[], Any], module: nn.Module) -> int:
    """Bytes that a forward keeps for backward, parameters and buffers of the module left out."""
    own = {t.untyped_storage().data_ptr() for t in (*module.parameters(), *module.buffers())}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = forward()  # alive until the end, so that no address is counted for two tensors
    del output
    return sum(kept.values())


class _LiveTensors(TorchDispatchMode):
    """Adds up, after every operator, the storages that operators have made and that are still alive."""

    def __init__(self) -> None:
        super().__init__()
        self.live: dict[StorageWeakRef, int] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = {StorageWeakRef(tensor.untyped_storage()) for tensor in _tensors((args, kwargs))}
        result = func(*args, **kwargs)
        for tensor in _tensors(result):
            reference = StorageWeakRef(tensor.untyped_storage())
            if reference not in given:
                self.live.setdefault(reference, tensor.untyped_storage().nbytes())
        self.live = {reference: size for reference, size in self.live.items() if not reference.expired()}
        self.peak = max(self.peak, sum(self.live.values()))
        return result


def _tensors(values: Any) -> list[torch.Tensor]:
    return [value for value in tree_leaves(values) if isinstance(value, torch.Tensor)]


def publish(name: str, device: str, result: dict[str, Any], tables: list[Table], charts: list[Chart]) -> None:
    """Print the tables; write results/<name>.json with the machine, and results/<name>.png."""
    for table in tables:
        shown = RichTable(title=table.title)
        for column in table.columns:
            shown.add_column(column, justify="right")
        for row in table.rows:
            shown.add_row(*row)
        Console().print(shown)
    RESULTS.mkdir(exist_ok=True)
    stem = RESULTS / (name if device == "cpu" else f"{name}_{device}")
    content = {"machine": machine(device), **result}
    stem.with_suffix(".json").write_text(json.dumps(content, indent=2) + "\n")
    if charts:
        draw(charts, stem.with_suffix(".png"))
    print(f"written: {stem}.json")


def draw(charts: list[Chart], path: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(charts), figsize=(6.4 * len(charts), 4.4), squeeze=False)
    for chart, axis in zip(charts, axes[0], strict=True):
        numbers = all(isinstance(value, (int, float)) for value in chart.x)
        for i, (label, values) in enumerate(chart.series.items()):
            if numbers:
                axis.plot(chart.x, values, marker="o", label=label)
                continue
            width = 0.8 / len(chart.series)
            places = [k + (i - (len(chart.series) - 1) / 2) * width for k in range(len(chart.x))]
            axis.bar(places, values, width, label=label)
        if numbers:
            axis.set_xscale("log", base=2)
            axis.set_xticks(chart.x, [f"{value:g}" for value in chart.x])
        else:
            axis.set_xticks(range(len(chart.x)), chart.x)
        axis.set_title(chart.title, fontsize=10)
        axis.set_ylabel(chart.ylabel)
        axis.set_xlabel(chart.xlabel)
        axis.grid(axis="y", alpha=0.3)
        axis.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    plt.close(figure)


def write(name: str, content: dict[str, Any]) -> None:
    """Write results/<name>.json, with the machine."""
    publish(name, "cpu", content, [], [])
