"""What a step of one layer costs against the number of tokens and against the rank.

python benchmarks/scaling.py [--device cuda] [--repeats 10]
"""

from __future__ import annotations

from common import Chart, Table, publish
from layer_step import one_layer
from peers import FLOOR, FOLDED, INTACT, LORA
from steps import Row, in_processes, options_of

WIDTH = {"cpu": 1024, "cuda": 4096}
TOKENS, RANK = (64, 256, 1024, 4096), 64
RANKS, COUNT = (8, 16, 32, 64, 128, 256), 1024
SHOWN = (LORA, INTACT, FOLDED)


def table(rows: list[Row]) -> Table:
    lines = [
        [
            row["label"],
            *("{median:.2f} ({low:.2f}-{high:.2f})".format(**row["ratios"][name]) for name in SHOWN),
            f"{row['limits'][INTACT]:.2f}",
            f"{row['limits'][FOLDED]:.2f}",
        ]
        for row in rows
    ]
    columns = ["", *SHOWN, "limit intact", "limit folded"]
    return Table("one layer, time / frozen base: median (quartiles)", columns, lines)


def chart(rows: list[Row], what: str, title: str) -> Chart:
    series = {name: [(row[what], row["ratios"][name]["median"]) for row in rows] for name in SHOWN}
    series |= {f"limit {name}": [(row[what], row["limits"][name]) for row in rows] for name in (INTACT, FOLDED)}
    return Chart(title, "time / frozen base", [], series, xlabel=what)


def main() -> None:
    options = options_of(__doc__, repeats=10)
    width, peers = WIDTH[options.device], (FLOOR, *SHOWN)
    by_tokens = [in_processes(one_layer, width, RANK, tokens, peers, options=options) for tokens in TOKENS]
    by_rank = [in_processes(one_layer, width, rank, COUNT, peers, options=options) for rank in RANKS]
    charts = [
        chart(by_tokens, "tokens", f"d {width}, r {RANK}"),
        chart(by_rank, "r", f"d {width}, {COUNT} tokens"),
    ]
    result = {"repeats": options.repeats, "processes": options.processes, "tokens": by_tokens, "r": by_rank}
    publish("scaling", options.device, result, table(by_tokens + by_rank), charts)


if __name__ == "__main__":
    main()
