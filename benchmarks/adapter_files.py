"""Saving and loading an adapter, beside PEFT's LoRA: size, time, time a byte.

    python benchmarks/adapter_files.py [--repeats 20]

A 4-layer Llama shape of width 1024 at r 64. Loading computes no decomposition and includes the check of the base
model's fingerprints.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from statistics import median
from typing import Any

from common import Chart, Table, arguments, interleave, publish, ratios
from model_step import llama
from peers import INTACT, LORA
from peft import LoraConfig, PeftModel, get_peft_model

from sorsa_plugin import SORSAConfig

OPTIONS: dict[str, Any] = {"r": 64, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}


def measure(directory: Path, options: Any) -> dict[str, Any]:
    configs = {LORA: LoraConfig(lora_alpha=64, **OPTIONS), INTACT: SORSAConfig(**OPTIONS)}
    models = {n: get_peft_model(llama(1024, 4, 16, 2816, 1024).to(options.device), c) for n, c in configs.items()}
    saving = {name: lambda n=name, m=model: m.save_pretrained(directory / n) for name, model in models.items()}
    times = {"save": interleave(saving, options.repeats)}
    # each adapter is loaded onto the base that it was made from; the fingerprint would tell
    bases = {name: model.unload() for name, model in models.items()}
    loading = {n: lambda n=n, b=b: PeftModel.from_pretrained(b, directory / n).unload() for n, b in bases.items()}
    times["load"] = interleave(loading, options.repeats)
    sizes = {name: (directory / name / "adapter_model.safetensors").stat().st_size for name in models}
    return {
        "bytes": sizes,
        "seconds": {what: {name: median(values) for name, values in found.items()} for what, found in times.items()},
        "ratios": {
            "size": sizes[INTACT] / sizes[LORA],
            **{what: ratios(found, LORA)[INTACT]["median"] for what, found in times.items()},
        },
    }


def table(result: dict[str, Any]) -> Table:
    over, seconds = result["ratios"], result["seconds"]
    lines = [
        [name, f"{result['bytes'][name] / 2**20:.1f}", *(f"{seconds[k][name] * 1e3:.0f}" for k in ("save", "load"))]
        for name in (LORA, INTACT)
    ]
    lines.append(["SORSA / LoRA", *(f"{value:.2f}" for value in over.values())])
    lines.append(["SORSA / LoRA, a byte", "1", *(f"{over[k] / over['size']:.2f}" for k in ("save", "load"))])
    return Table("adapter files", ["", "MiB", "ms to save", "ms to load"], lines)


def main() -> None:
    options = arguments(__doc__, repeats=20).parse_args()
    with tempfile.TemporaryDirectory() as directory:
        result = {"repeats": options.repeats, **measure(Path(directory), options)}
    over = result["ratios"]
    chart = Chart("adapter files, SORSA / LoRA", "ratio", list(over), {"": list(over.values())})
    publish("adapter_files", options.device, result, table(result), [chart])


if __name__ == "__main__":
    main()
