"""What a step of one layer costs against the number of tokens and against the rank (d 1024).

python benchmarks/scaling.py [--device cuda]
"""

from __future__ import annotations

from argparse import Namespace
from typing import Any

import layer_step
from common import Chart, Table, arguments, publish
from peers import FLOOR, FOLDED, INTACT, LORA

WIDTH = 1024
TOKENS, RANK = (64, 256, 1024, 4096), 64
RANKS, COUNT = (8, 16, 32, 64, 128, 256), 1024
SHOWN = (LORA, INTACT, FOLDED)


def tables(result: dict[str, Any]) -> list[Table]:
    found = []
    for what, fixed in (("tokens", f"r {RANK}"), ("r", f"{COUNT} tokens")):
        rows = [
            [
                str(row[what]),
                *(f"{row['ratios'][name]['median']:.2f}" for name in SHOWN),
                f"{row['limits'][INTACT]:.2f}",
            ]
            for row in result[what]
        ]
        found.append(
            Table(f"step / frozen base against {what} (d {WIDTH}, {fixed})", [what, *SHOWN, "limit intact"], rows)
        )
    return found


def charts(result: dict[str, Any]) -> list[Chart]:
    found = []
    for what, fixed in (("tokens", f"r {RANK}"), ("r", f"{COUNT} tokens")):
        rows = result[what]
        series = {name: [row["ratios"][name]["median"] for row in rows] for name in SHOWN}
        series |= {f"limit {name}": [row["limits"][name] for row in rows] for name in (INTACT, FOLDED)}
        found.append(Chart(f"d {WIDTH}, {fixed}", "time / frozen base", [r[what] for r in rows], series, xlabel=what))
    return found


def main() -> None:
    options = arguments(__doc__, repeats=10).parse_args()
    layer_step.PEERS = (FLOOR, *SHOWN)  # type: ignore[assignment]
    settings = Namespace(**vars(options), dtype="float32", autocast=options.device == "cuda")
    result: dict[str, Any] = {
        "repeats": options.repeats,
        "tokens": [layer_step.measure(WIDTH, RANK, tokens, settings) for tokens in TOKENS],
        "r": [layer_step.measure(WIDTH, rank, COUNT, settings) for rank in RANKS],
    }
    publish("scaling", options.device, result, tables(result), charts(result))


if __name__ == "__main__":
    main()
