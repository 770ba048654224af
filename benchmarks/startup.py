"""What SORSA costs before the first step and on disk: factorisation, adapter size, saving and loading.

    python benchmarks/startup.py

Factorisation: one 4096 x 4096 fp32 weight at r 128, beside the randomized SVD that PEFT's `pissa_niter_4` and
`pissa_niter_16` call, with the share of the weight's energy that each captures. The spectrum is that of a random
matrix plus a power law, as trained weights have. Size, saving and loading: a 4-layer Llama shape of width 1024.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch
from common import interleave, ratios, write
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from sorsa_plugin import SORSAConfig, captured_energy, factorise
from sorsa_plugin.decomposition import Triplets

WIDTH, RANK = 4096, 128


def heavy_tailed(width: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(width, width, generator=generator) / width**0.5
    U, _ = torch.linalg.qr(torch.randn(width, 256, generator=generator))
    V, _ = torch.linalg.qr(torch.randn(width, 256, generator=generator))
    spectrum = 20.0 * torch.arange(1, 257, dtype=torch.float32) ** -0.7
    return noise + (U * spectrum) @ V.T


def lowrank(weight: torch.Tensor, iterations: int) -> Triplets:
    return Triplets(*torch.svd_lowrank(weight, RANK, niter=iterations))


def tiny_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=1024,
            hidden_size=1024,
            intermediate_size=2816,
            num_hidden_layers=4,
            num_attention_heads=16,
            num_key_value_heads=16,
        )
    )


def adapters(directory: Path, repeats: int) -> dict[str, Any]:
    shared: dict[str, Any] = {"r": 64, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    models = {
        "LoRA": get_peft_model(tiny_model(), LoraConfig(lora_alpha=64, **shared)),
        "SORSA": get_peft_model(tiny_model(), SORSAConfig(**shared)),
    }
    saving = interleave(
        {name: lambda m=model, n=name: m.save_pretrained(directory / n) for name, model in models.items()}, repeats
    )
    base = tiny_model()

    def load(name: str) -> None:
        PeftModel.from_pretrained(base, directory / name).unload()

    loading = interleave({name: lambda n=name: load(n) for name in models}, repeats)
    sizes = {name: (directory / name / "adapter_model.safetensors").stat().st_size for name in models}
    return {
        "bytes": sizes,
        "size_ratio": sizes["SORSA"] / sizes["LoRA"],
        "save_ratio": ratios(saving, "LoRA")["SORSA"]["median"],
        "load_ratio": ratios(loading, "LoRA")["SORSA"]["median"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()

    weight = heavy_tailed(WIDTH)
    methods = {
        "pissa_niter_16": lambda: lowrank(weight, 16),
        "pissa_niter_4": lambda: lowrank(weight, 4),
        "sorsa randomized": lambda: factorise(weight, RANK, svd="randomized"),
    }
    energies = {name: captured_energy(weight, method()) for name, method in methods.items()}
    best = float(torch.linalg.svdvals(weight)[:RANK].square().sum() / weight.square().sum())
    times = interleave(methods, options.repeats, warmup=1)
    quotients = ratios(times, "pissa_niter_16")
    for name in methods:
        seconds = sorted(times[name])[len(times[name]) // 2]
        print(
            f"{name:18} {seconds:6.2f} s a matrix, {quotients[name]['median']:.2f} x pissa_niter_16, "
            f"captures {energies[name] / best:.5f} of the best rank-{RANK} energy"
        )
    with tempfile.TemporaryDirectory() as directory:
        files = adapters(Path(directory), options.repeats)
    print(
        f"adapter file {files['size_ratio']:.2f} x LoRA's, saved in {files['save_ratio']:.2f} x the time, loaded in "
        f"{files['load_ratio']:.2f} x"
    )
    write(
        "startup",
        {
            "factorisation": {
                name: {
                    "seconds": sorted(times[name])[len(times[name]) // 2],
                    "ratio": quotients[name],
                    "energy_of_best": energies[name] / best,
                }
                for name in methods
            },
            "files": files,
        },
    )


if __name__ == "__main__":
    main()
