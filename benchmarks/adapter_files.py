"""Saving and loading an adapter, beside PEFT's LoRA: size, time, time a byte.

    python benchmarks/adapter_files.py

A 4-layer Llama shape of width 1024 at r 64. Loading computes no decomposition and includes the check of the base
model's fingerprints.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from common import Chart, Table, arguments, interleave, publish, ratios, spread
from model_step import llama
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from sorsa_plugin import SORSAConfig

SHARED: dict[str, Any] = {"r": 64, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}


def base() -> nn.Module:
    return llama(1024, 4, 16, 2816, 1024)


def measure(directory: Path, repeats: int) -> dict[str, Any]:
    models = {
        "LoRA": get_peft_model(base(), LoraConfig(lora_alpha=64, **SHARED)),
        "SORSA": get_peft_model(base(), SORSAConfig(**SHARED)),
    }
    saving = interleave(
        {name: lambda m=model, n=name: m.save_pretrained(directory / n) for name, model in models.items()}, repeats
    )
    # each adapter is loaded onto the base it was made from; the fingerprint would tell
    own = {name: model.unload() for name, model in models.items()}

    def load(name: str) -> None:
        PeftModel.from_pretrained(own[name], directory / name).unload()

    loading = interleave({name: lambda n=name: load(n) for name in models}, repeats)
    sizes = {name: (directory / name / "adapter_model.safetensors").stat().st_size for name in models}
    found: dict[str, Any] = {
        name: {
            "bytes": sizes[name],
            "save": spread(saving[name])["median"],
            "load": spread(loading[name])["median"],
        }
        for name in models
    }
    found["ratios"] = {
        "bytes": sizes["SORSA"] / sizes["LoRA"],
        "save": ratios(saving, "LoRA")["SORSA"]["median"],
        "load": ratios(loading, "LoRA")["SORSA"]["median"],
    }
    return found


def tables(result: dict[str, Any]) -> list[Table]:
    rows = [
        [name, f"{result[name]['bytes'] / 2**20:.1f}", *(f"{result[name][k] * 1e3:.0f}" for k in ("save", "load"))]
        for name in ("LoRA", "SORSA")
    ]
    over = result["ratios"]
    rows.append(["SORSA / LoRA", *(f"{over[k]:.2f}" for k in ("bytes", "save", "load"))])
    rows.append(["a byte", "", *(f"{over[k] / over['bytes']:.2f}" for k in ("save", "load"))])
    return [Table("adapter files", ["", "MiB", "ms to save", "ms to load"], rows)]


def charts(result: dict[str, Any]) -> list[Chart]:
    over = result["ratios"]
    return [Chart("SORSA / LoRA", "ratio", ["bytes", "save", "load"], {"SORSA": [over[k] for k in over]})]


def main() -> None:
    options = arguments(__doc__, repeats=6).parse_args()
    with tempfile.TemporaryDirectory() as directory:
        result = measure(Path(directory), options.repeats)
    publish("adapter_files", options.device, result, tables(result), charts(result))


if __name__ == "__main__":
    main()
