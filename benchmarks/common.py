"""What every benchmark shares: interleaved timing, and results as a table, a chart and a file that says where they
come from."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import random
import statistics
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table as RichTable

RESULTS = Path(__file__).parent / "results"


class Table(NamedTuple):
    title: str
    columns: list[str]
    rows: list[list[str]]


class Chart(NamedTuple):
    """Bars over the names in `x`, or, without names, lines through (x, y) points on a logarithmic x axis."""

    title: str
    ylabel: str
    x: list[str]
    series: dict[str, list[Any]]
    xlabel: str = ""
    log: bool = False


def arguments(doc: str | None, repeats: int) -> argparse.ArgumentParser:
    """--device, by default an accelerator where there is one, and --repeats."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    parser.add_argument("--repeats", type=int, default=repeats)
    return parser


def machine(device: str) -> dict[str, Any]:
    """Processor and accelerator, threads, load, versions and date of this run."""
    processor = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        processor = next(
            (line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")),
            processor,
        )
    return {
        "processor": processor,
        "threads": torch.get_num_threads(),
        "load average": round(os.getloadavg()[0], 1),
        "accelerator": torch.cuda.get_device_name() if device == "cuda" else None,
        "versions": {name: version_of(name) for name in ("torch", "transformers", "peft", "sorsa-plugin")},
        "date": date.today().isoformat(),
    }


def version_of(package: str) -> str | None:
    """None where it is not installed, as this package is not where it is used from its folder."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def timed(function: Callable[[], Any]) -> float:
    """Seconds of one call."""
    synchronise()
    start = time.perf_counter()
    function()
    synchronise()
    return time.perf_counter() - start


def interleave(functions: dict[str, Callable[[], Any]], repeats: int, warmup: int = 2) -> dict[str, list[float]]:
    """Seconds of each call: all functions in every repeat, so that a slow minute slows them alike, in a new order each
    time, so that none always finds the caches and the heap as the same other one left them."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    order = random.Random(0)
    for repeat in range(-warmup, repeats):
        for name in order.sample(list(functions), len(functions)):
            seconds = timed(functions[name])
            if repeat >= 0:
                times[name].append(seconds)
    return times


def spread(values: list[float]) -> dict[str, float]:
    """Median and quartiles."""
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    return {"median": middle, "low": low, "high": high}


def ratios(times: dict[str, list[float]], floor: str) -> dict[str, dict[str, float]]:
    """Spread of the per-repeat ratios to `floor`."""
    return {
        name: spread([value / base for value, base in zip(values, times[floor], strict=True)])
        for name, values in times.items()
    }


def publish(name: str, device: str, result: dict[str, Any], table: Table, charts: list[Chart]) -> None:
    """Print the table; write results/<name>.json (<name>_cuda.json) with it and the machine, and the charts as .png, if
    there are any. Called again with more rows, it writes them anew: a run that is cut off leaves what it has."""
    shown = RichTable(title=table.title)
    for column in table.columns:
        shown.add_column(column, justify="left" if column == table.columns[0] else "right")
    for row in table.rows:
        shown.add_row(*row)
    Console(width=170).print(shown)
    stem = name if device == "cpu" else f"{name}_{device}"
    write(stem, {"table": table._asdict(), **result}, device)
    if charts:
        draw(charts, RESULTS / f"{stem}.png")


def write(name: str, result: dict[str, Any], device: str = "cpu") -> None:
    """Write results/<name>.json: the result, and the machine."""
    (RESULTS / f"{name}.json").write_text(json.dumps({"machine": machine(device), **result}, indent=1) + "\n")
    print(f"written: benchmarks/results/{name}.json")


def draw(charts: list[Chart], path: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(charts), figsize=(7 * len(charts), 4.4), squeeze=False)
    for chart, axis in zip(charts, axes[0], strict=True):
        for i, (label, values) in enumerate(chart.series.items()):
            if not chart.x:
                axis.plot(*zip(*values, strict=True), marker="o", ls="--" if "limit" in label else "-", label=label)
                continue
            width = 0.8 / len(chart.series)
            places = [k + (i - (len(chart.series) - 1) / 2) * width for k in range(len(chart.x))]
            axis.bar(places, values, width, label=label)
        if chart.x:
            axis.set_xticks(range(len(chart.x)), chart.x, fontsize=8)
        else:
            axis.set_xscale("log", base=2)
            axis.minorticks_off()
            measured = sorted({x for values in chart.series.values() for x, _ in values})
            axis.set_xticks(measured, [f"{x:g}" for x in measured])
        axis.set_title(chart.title, fontsize=10)
        axis.set_ylabel(chart.ylabel)
        axis.set_yscale("log" if chart.log else "linear")
        axis.set_xlabel(chart.xlabel)
        axis.grid(axis="y", alpha=0.3)
    figure.tight_layout()
    handles, labels = axes[0][0].get_legend_handles_labels()
    if len(labels) > 1:  # the charts of a figure show the same series
        figure.legend(handles, labels, fontsize=8, ncols=len(labels), loc="upper center", bbox_to_anchor=(0.5, 0))
    figure.savefig(path, dpi=90, bbox_inches="tight")
    plt.close(figure)
