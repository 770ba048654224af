"""What folding costs: rounding, memory, and the time to fold and unfold one layer. What it gains is in `layer_step`.

    python benchmarks/folding.py [--device cuda] [--repeats 10]

A heavy-tailed 1024 x 1024 weight at r 64. Errors are relative, against the layer in float64: of the base model's output
with the adapter disabled, and of the change that an adapter makes whose factors moved by 0.1%.
"""

from __future__ import annotations

from typing import Any

import torch
from common import Chart, Table, arguments, publish, spread, timed
from initialisation import heavy_tailed
from layer_step import OneLayer
from peft import get_peft_model

from sorsa_plugin import SORSAConfig

WIDTH, RANK, TOKENS, MOVED = 1024, 64, 1024, 1e-3


def relative(value: torch.Tensor, exact: torch.Tensor) -> float:
    return float((value.double() - exact).norm() / exact.norm())


@torch.no_grad()
def measure(dtype: torch.dtype, options: Any) -> dict[str, Any]:
    torch.manual_seed(0)
    base = OneLayer(WIDTH).to(options.device)
    base.layer.weight.data = heavy_tailed(WIDTH).to(options.device, dtype)
    x = torch.randn(TOKENS, WIDTH, device=options.device).to(dtype)
    model = get_peft_model(base, SORSAConfig(r=RANK, target_modules=["layer"]))
    layer = model.base_model.model.layer
    factors = layer.factors("default")
    for offset, initial in zip((factors.dU, factors.dS, factors.dV), (factors.U0, factors.S0, factors.V0), strict=True):
        offset.normal_().mul_(MOVED * initial.norm() / offset.norm())
    plain = x.double() @ layer.base_matrix().double().T
    U, S, V = (part.double() for part in layer.get_factors())
    change = x.double() @ ((U * S) @ V.T - (factors.U0.double() * factors.S0.double()) @ factors.V0.double().T).T

    def errors() -> dict[str, float]:
        with model.disable_adapter():
            disabled = model(x)
        return {"base": relative(disabled, plain), "change": relative(model(x).double() - disabled.double(), change)}

    found: dict[str, Any] = {"dtype": str(dtype).removeprefix("torch."), "intact": errors()}
    folding, unfolding = [], []
    for _ in range(options.repeats):
        folding.append(timed(model.fold))
        found["folded"] = errors()
        unfolding.append(timed(model.unfold))
    extra = WIDTH * WIDTH * dtype.itemsize
    return {**found, "fold": spread(folding), "unfold": spread(unfolding), "extra bytes": extra}


def table(rows: list[dict[str, Any]]) -> Table:
    lines = [
        [
            f"{row['dtype']} {state}",
            f"{row[state]['base']:.1e}",
            f"{row[state]['change']:.1e}",
            f"{row['extra bytes'] / 2**20:.0f}" if state == "folded" else "0",
            f"{row['fold']['median'] * 1e3:.1f}" if state == "folded" else "",
            f"{row['unfold']['median'] * 1e3:.2f}" if state == "folded" else "",
        ]
        for row in rows
        for state in ("intact", "folded")
    ]
    columns = ["", "error, disabled", "error of a 0.1% change", "MiB more", "ms to fold", "ms to unfold"]
    return Table(f"folding one layer, {WIDTH} x {WIDTH}, r {RANK}", columns, lines)


def main() -> None:
    options = arguments(__doc__, repeats=10).parse_args()
    rows = [measure(dtype, options) for dtype in (torch.float32, torch.bfloat16)]
    names = [row["dtype"] for row in rows]
    charts = [
        Chart(
            title, "relative error", names, {k: [row[k][what] for row in rows] for k in ("intact", "folded")}, log=True
        )
        for what, title in (("base", "output with the adapter disabled"), ("change", "a 0.1% change"))
    ]
    publish("folding", options.device, {"repeats": options.repeats, "rows": rows}, table(rows), charts)


if __name__ == "__main__":
    main()
