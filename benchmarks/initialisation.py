"""Factorisation: time of one weight against the energy captured, beside what PEFT's PiSSA calls.

    python benchmarks/initialisation.py                  4096 x 4096 heavy-tailed and 2048 x 2048 Gaussian, r 128
    python benchmarks/initialisation.py --device cuda    the same, and all 224 matrices of a Llama-2-7B shape

The heavy-tailed spectrum is that of a random matrix plus a power law, as trained weights have; Gaussian weights have
no gap anywhere. Energy is sum diag(U^T W V)^2 over that of the best triplets.
"""

from __future__ import annotations

from typing import Any

import torch
from common import Chart, Table, arguments, interleave, publish, ratios, spread, timed

from sorsa_plugin import captured_energy, factorise
from sorsa_plugin.linalg.svd import DEFAULT_ENERGY, Triplets

RANK = 128
LAYER_7B = [(4096, 4096)] * 4 + [(11008, 4096)] * 2 + [(4096, 11008)]
LAYERS_7B = 32


def gaussian(width: int) -> torch.Tensor:
    return torch.randn(width, width, generator=torch.Generator().manual_seed(0)) / width**0.5


def heavy_tailed(width: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    U, _ = torch.linalg.qr(torch.randn(width, 256, generator=generator))
    V, _ = torch.linalg.qr(torch.randn(width, 256, generator=generator))
    spectrum = 20.0 * torch.arange(1, 257, dtype=torch.float32) ** -0.7
    return gaussian(width) + (U * spectrum) @ V.T


WEIGHTS = {"heavy-tailed 4096 x 4096": lambda: heavy_tailed(4096), "Gaussian 2048 x 2048": lambda: gaussian(2048)}


def pissa(weight: torch.Tensor, iterations: int) -> Triplets:
    return Triplets(*torch.svd_lowrank(weight, RANK, niter=iterations))


METHODS = {
    "pissa_niter_4": lambda weight: pissa(weight, 4),
    "pissa_niter_16": lambda weight: pissa(weight, 16),
    **{
        f"SORSA, svd_energy {energy}": lambda weight, energy=energy: factorise(
            weight, RANK, svd="randomized", energy=energy
        )
        for energy in (0.99, DEFAULT_ENERGY, 0.9995)
    },
}


def measure(name: str, options: Any) -> dict[str, Any]:
    weight = WEIGHTS[name]().to(options.device)
    found: dict[str, Any] = {}
    full = timed(lambda: found.update(svd=torch.linalg.svd(weight, full_matrices=False)))
    best = float(found["svd"][1][:RANK].square().sum() / weight.square().sum())
    times = interleave({n: lambda m=m: m(weight) for n, m in METHODS.items()}, options.repeats, warmup=1)
    over = ratios(times, "pissa_niter_16")
    methods = {
        n: {
            "seconds": spread(times[n])["median"],
            "ratio": over[n],
            "energy": captured_energy(weight, METHODS[n](weight)) / best,
        }
        for n in METHODS
    }
    methods["full SVD (PiSSA)"] = {"seconds": full, "energy": 1.0}
    return {"label": name, "methods": methods}


def all_of_7b(device: str) -> dict[str, Any]:
    """Seconds for all matrices of Llama-2-7B's shape, one after another; seven random ones stand for all."""
    weights = [torch.randn(shape, device=device, dtype=torch.bfloat16) for shape in LAYER_7B]
    methods = {name: METHODS[name] for name in ("pissa_niter_16", f"SORSA, svd_energy {DEFAULT_ENERGY}")}
    seconds = {
        name: timed(lambda m=method: [m(w.float()) for w in weights for _ in range(LAYERS_7B)])
        for name, method in methods.items()
    }
    return {
        "label": f"all {LAYERS_7B * len(weights)} matrices of Llama-2-7B's shape",
        "methods": {name: {"seconds": value} for name, value in seconds.items()},
    }


def table(rows: list[dict[str, Any]]) -> Table:
    lines = [
        [
            f"{row['label']}: {name}",
            f"{value['seconds']:.2f}",
            "{median:.2f} ({low:.2f}-{high:.2f})".format(**value["ratio"]) if "ratio" in value else "",
            f"{value['energy']:.4f}" if "energy" in value else "",
        ]
        for row in rows
        for name, value in row["methods"].items()
    ]
    columns = ["", "seconds", "/ pissa_niter_16: median (quartiles)", "energy / best"]
    return Table(f"factorisation, r {RANK}", columns, lines)


def chart(row: dict[str, Any]) -> Chart:
    points = {n: (v["ratio"]["median"], v["energy"]) for n, v in row["methods"].items() if "ratio" in v}
    series = {
        "PiSSA": [p for n, p in points.items() if "pissa" in n],
        "SORSA": [p for n, p in points.items() if "SORSA" in n],
    }
    return Chart(f"{row['label']}, r {RANK}", "energy / best", [], series, xlabel="time / pissa_niter_16")


def main() -> None:
    options = arguments(__doc__, repeats=5).parse_args()
    rows = [measure(name, options) for name in WEIGHTS]
    charts = [chart(row) for row in rows]
    if options.device == "cuda":
        rows.append(all_of_7b(options.device))
    publish("initialisation", options.device, {"repeats": options.repeats, "rows": rows}, table(rows), charts)


if __name__ == "__main__":
    main()
