"""What every benchmark shares: interleaved timing, medians, and result files that say where they come from."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import statistics
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"


def machine() -> dict[str, Any]:
    """Processor or accelerator, threads, versions and date of this run."""
    processor = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        processor = next(
            (line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")),
            processor,
        )
    versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers", "peft", "sorsa-plugin")}
    accelerator = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "processor": processor,
        "threads": torch.get_num_threads(),
        "accelerator": accelerator,
        "versions": versions,
        "date": date.today().isoformat(),
    }


def interleave(functions: dict[str, Callable[[], Any]], repeats: int, warmup: int = 2) -> dict[str, list[float]]:
    """Seconds of each call, all functions in turn in every repeat, so that a slow minute slows them alike."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for repeat in range(-warmup, repeats):
        for name, function in functions.items():
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            start = time.perf_counter()
            function()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if repeat >= 0:
                times[name].append(time.perf_counter() - start)
    return times


def ratios(times: dict[str, list[float]], floor: str) -> dict[str, dict[str, float]]:
    """Median of the per-repeat ratios to `floor`, with the quartiles."""
    result = {}
    for name, values in times.items():
        quotients = [value / base for value, base in zip(values, times[floor], strict=True)]
        low, middle, high = statistics.quantiles(quotients, n=4)
        result[name] = {"median": middle, "low": low, "high": high}
    return result


def write(name: str, content: dict[str, Any]) -> None:
    """Write benchmarks/results/<name>.json, with the machine."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps({"machine": machine(), **content}, indent=2) + "\n")
    print(f"written: {path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path}")
