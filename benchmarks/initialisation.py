"""Factorisation: time of one weight against the energy captured, beside what PEFT's PiSSA calls.

    python benchmarks/initialisation.py                  4096 x 4096, r 128, heavy-tailed and Gaussian spectra
    python benchmarks/initialisation.py --device cuda    the same, and all 224 matrices of a Llama-2-7B shape

The heavy-tailed spectrum is that of a random matrix plus a power law, as trained weights have; Gaussian weights have
no gap anywhere. Energy is sum diag(U^T W V)^2 over that of the best triplets.
"""

from __future__ import annotations

from typing import Any

import torch
from common import Chart, Table, arguments, interleave, publish, ratios, spread, timed

from sorsa_plugin import captured_energy, factorise
from sorsa_plugin.decomposition import DEFAULT_ENERGY, Triplets

RANK = 128
SIZES = {"heavy-tailed": 4096, "Gaussian": 2048}
SHAPES_7B = [(4096, 4096)] * 4 + [(11008, 4096)] * 2 + [(4096, 11008)]


def heavy_tailed(width: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(width, width, generator=generator) / width**0.5
    U, _ = torch.linalg.qr(torch.randn(width, 256, generator=generator))
    V, _ = torch.linalg.qr(torch.randn(width, 256, generator=generator))
    spectrum = 20.0 * torch.arange(1, 257, dtype=torch.float32) ** -0.7
    return noise + (U * spectrum) @ V.T


def gaussian(width: int) -> torch.Tensor:
    return torch.randn(width, width, generator=torch.Generator().manual_seed(0)) / width**0.5


def lowrank(weight: torch.Tensor, iterations: int) -> Triplets:
    return Triplets(*torch.svd_lowrank(weight, RANK, niter=iterations))


def measure(spectrum: str, options: Any) -> dict[str, Any]:
    size = SIZES[spectrum]
    weight = (heavy_tailed(size) if spectrum == "heavy-tailed" else gaussian(size)).to(options.device)
    found: dict[str, Any] = {}
    full = timed(lambda: found.update(svd=torch.linalg.svd(weight, full_matrices=False)))
    best = float(found["svd"][1][:RANK].square().sum() / weight.square().sum())
    methods = {
        "pissa_niter_4": lambda: lowrank(weight, 4),
        "pissa_niter_16": lambda: lowrank(weight, 16),
        **{
            f"SORSA, svd_energy {energy}": lambda e=energy: factorise(weight, RANK, svd="randomized", energy=e)
            for energy in (0.99, DEFAULT_ENERGY, 0.9995)
        },
    }
    energies = {name: captured_energy(weight, method()) / best for name, method in methods.items()}
    times = interleave(methods, options.repeats, warmup=1)
    over = ratios(times, "pissa_niter_16")
    rows = {
        name: {"seconds": spread(times[name])["median"], "ratio": over[name], "energy": energies[name]}
        for name in methods
    }
    rows["full SVD (PiSSA)"] = {"seconds": full, "energy": 1.0}
    return {"spectrum": spectrum, "size": size, "methods": rows}


def all_of_7b(device: str) -> dict[str, float]:
    """Seconds for the 224 matrices of a Llama-2-7B shape, the layers' weights random, one after another."""
    weights = [torch.randn(shape, device=device, dtype=torch.bfloat16) for shape in SHAPES_7B]
    ours = timed(lambda: [factorise(w, RANK, svd="randomized") for w in weights for _ in range(32)])
    pissa = timed(lambda: [lowrank(w.float(), 16) for w in weights for _ in range(32)])
    return {"SORSA": ours, "pissa_niter_16": pissa}


def tables(result: dict[str, Any]) -> list[Table]:
    found = []
    for row in result["rows"]:
        lines = [
            [
                name,
                f"{value['seconds']:.2f}",
                f"{value['ratio']['median']:.2f}" if "ratio" in value else "",
                f"{value['energy']:.4f}",
            ]
            for name, value in row["methods"].items()
        ]
        title = f"{row['spectrum']} weight, {row['size']} x {row['size']}, r {RANK}"
        found.append(Table(title, ["", "seconds", "/ pissa_niter_16", "energy of the best"], lines))
    if "all 224" in result:
        lines = [[name, f"{seconds:.1f}"] for name, seconds in result["all 224"].items()]
        found.append(Table("224 matrices of a Llama-2-7B shape", ["", "seconds"], lines))
    return found


def charts(result: dict[str, Any]) -> list[Chart]:
    found = []
    for row in result["rows"]:
        names = [name for name in row["methods"] if "full" not in name]
        series = {
            "time / pissa_niter_16": [row["methods"][name]["ratio"]["median"] for name in names],
            "energy of the best": [row["methods"][name]["energy"] for name in names],
        }
        labels = [name.replace(", ", "\n").replace("niter_", "\nniter_") for name in names]
        found.append(Chart(f"{row['spectrum']} {row['size']} x {row['size']}, r {RANK}", "", labels, series))
    return found


def main() -> None:
    options = arguments(__doc__, repeats=5).parse_args()
    result: dict[str, Any] = {"repeats": options.repeats, "rows": [measure(name, options) for name in SIZES]}
    if options.device == "cuda":
        result["all 224"] = all_of_7b(options.device)
    publish("initialisation", options.device, result, tables(result), charts(result))


if __name__ == "__main__":
    main()
