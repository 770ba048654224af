"""Tables and charts of a study's runs, into benchmarks/results and docs; incomplete studies are reported as such.

python benchmarks/report_study.py benchmarks/study/smollm2_top10.yaml
python benchmarks/report.py                                             puts the tables into docs/results.md
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib as mpl
from common import RESULTS, Table
from rich.console import Console
from rich.table import Table as RichTable
from study.design import rate, read_study
from study.summary import AXES, CONTROL, Summary

DOCS = Path(__file__).parent.parent / "docs"


def rates(summary: Summary) -> Table:
    """Validation loss of every method at every rate."""
    columns = ["method", *(f"{lr:g}" for lr in summary.rates())]
    rows = []
    for name in summary.methods:
        losses = {rate(exponent): loss for exponent, loss in summary.grid[name].items()}
        best = min(losses.values())
        cells = ["" if lr not in losses else f"{losses[lr]:.4f}" for lr in summary.rates()]
        rows.append(
            [name, *(f"**{cell}**" if cell == f"{best:.4f}" else cell.replace("inf", "diverged") for cell in cells)]
        )
    title = f"{summary.study.title}: loss on validation rows by learning rate, one seed; the best in bold"
    return Table(title, columns, rows)


def tests(summary: Summary) -> Table:
    """Test losses of the methods whose seeds are complete, each beside LoRA's."""
    untrained = summary.untrained(final=True)
    columns = [
        "method",
        "rate",
        "trained",
        "task",
        "task - LoRA's",
        "",
        "Brown",
        "Brown - LoRA's",
        "",
        "HumanEval",
        "KL",
    ]
    found = {axis: summary.differences(axis) for axis in AXES}
    rows = [["untrained", "", "0", f"{untrained['task']:.4f}", "", "", f"{untrained['brown']:.4f}", "", ""]]
    rows[0] += [f"{untrained['human_eval']:.4f}", ""]
    for name in summary.complete():
        best = summary.best(name)
        assert best is not None
        row = [name, f"{best['lr']:g}", f"{best['trainable']:,}"]
        for axis in ("task", "brown"):
            row += [f"{summary.mean(name, axis):.4f}", *compared(found[axis].get(name))]
        rows.append([*row, f"{summary.mean(name, 'human_eval'):.4f}", f"{summary.mean(name, 'kl'):.4f}"])
    seeds = len(summary.study.seeds)
    return Table(
        f"{summary.study.title}: nats a token on rows not seen before, {seeds} seeds at the best rate", columns, rows
    )


def compared(found: tuple[Any, float, str] | None) -> list[str]:
    if found is None:
        return ["", ""]
    one, _, words = found
    return [f"{one.mean:+.4f} ({one.low:+.4f} to {one.high:+.4f})", words]


def matched(summary: Summary) -> Table:
    """Every method where its rates change the weights as much as LoRA's best rate does."""
    control = summary.best(CONTROL) if CONTROL in summary.methods else None
    rows = []
    if control is not None:
        for name in summary.methods:
            means = summary.matched(name, control["relative_change"])
            cells = (
                ["no rate changes as much"] + [""] * 2 if means is None else [f"{means[axis]:.4f}" for axis in means]
            )
            rows.append([name, *cells])
    change = f"{control['relative_change']:.3g}" if control else "-"
    title = f"{summary.study.title}: at LoRA's relative change of the weights, {change}, on validation rows"
    return Table(title, ["method", "task", "Brown", "KL"], rows)


def gammas(summary: Summary) -> Table:
    """SORSA's regularizers at their best rates."""
    rows = []
    for name in summary.methods:
        best = summary.best(name)
        if best is not None and best["gap"]:
            means = best["means"]
            cells = [
                best["gap"]["mean"],
                best["gap"]["largest"],
                means["task"],
                means["brown"],
                best["relative_change"],
            ]
            rows.append([name, f"{best['lr']:g}", *(f"{cell:.4f}" for cell in cells)])
    columns = ["method", "rate", "gap, mean", "largest", "task", "Brown", "relative change"]
    return Table(f"{summary.study.title}: SORSA's regularizer at each best rate, on validation rows", columns, rows)


TABLES: dict[str, Callable[[Summary], Table]] = {"tests": tests, "rates": rates, "matched": matched, "gammas": gammas}


def draw(summary: Summary, path: Path) -> None:
    """Loss by rate, and the frontier: loss on the task against loss on Brown, a line through each method's rates."""
    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 5))
    for name in summary.methods:
        runs = sorted((run["lr"], run) for (method, _), run in summary.runs.items() if method == name)
        kept = [(lr, run["means"]) for lr, run in runs if "brown" in run["means"]]
        style = "o-" if name.startswith("sorsa") else "s--"
        (line,) = left.plot([lr for lr, _ in kept], [means["task"] for _, means in kept], style, ms=4, label=name)
        means_of = [means for _, means in kept]
        right.plot([m["brown"] for m in means_of], [m["task"] for m in means_of], style, ms=4, color=line.get_color())
    untrained = summary.untrained(final=False)
    right.plot(untrained["brown"], untrained["task"], "k*", ms=10)
    best = min(loss for losses in summary.grid.values() for loss in losses.values())
    room = untrained["task"] - best
    for axis in (left, right):
        axis.set_ylim(best - 0.05 * room, best + 0.6 * room)
        axis.set_ylabel("loss on the task, nats a token")
        axis.grid(alpha=0.3)
    left.set_xscale("log")
    left.set_xlabel("learning rate")
    right.set_xlim(untrained["brown"] - 0.02, untrained["brown"] + 0.3)
    right.set_xlabel("loss on Brown, nats a token (star: untrained)")
    figure.suptitle(f"{summary.study.title}; validation rows, one seed")
    figure.legend(*left.get_legend_handles_labels(), ncols=5, loc="upper center", bbox_to_anchor=(0.5, 0), fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=90, bbox_inches="tight")
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the studies' results")
    parser.add_argument("--docs", type=Path, default=DOCS, help="folder of the chart")
    options = parser.parse_args()

    study = read_study(options.study)
    summary = Summary(study, options.results / study.name)
    for name, table_of in TABLES.items():
        table = table_of(summary)
        shown = RichTable(*table.columns, title=table.title)
        for row in table.rows:
            shown.add_row(*row)
        Console(width=200).print(shown)
        content = {"machine": summary.machine, "hours": summary.hours, "table": table._asdict()}
        (options.results / f"{study.name}_{name}.json").write_text(json.dumps(content, indent=1) + "\n")
    draw(summary, options.docs / f"{study.name}.png")
    print(f"{summary.hours:.1f} CPU hours.")
    for fault in summary.faults():
        print(fault)


if __name__ == "__main__":
    main()
