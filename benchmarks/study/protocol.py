"""Which run comes next: the search for each method's learning rate, then seeds at the best one. Knows no model."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .design import HALF_DECADES, Method, Study, rate


@dataclass(frozen=True, order=True)
class Run:
    """One training run. A final run reads the test rows, a run of the grid the validation rows."""

    method: str
    exponent: int
    seed: int
    final: bool

    @property
    def lr(self) -> float:
        return rate(self.exponent)

    @property
    def name(self) -> str:
        return f"{self.method}-{self.lr:.1e}-{'test' if self.final else 'grid'}-{self.seed}"


Losses = Mapping[int, float]
"""{exponent of a rate: validation loss of its run}"""

UNTRAINED = "base"
"""The method that trains nothing, which the others are compared with."""


def results_of(folder: Path) -> list[dict[str, Any]]:
    """The finished runs of a study's folder."""
    return [json.loads(file.read_text()) for file in sorted(folder.glob("*.json"))]


def grid_of(results: Iterable[dict[str, Any]]) -> dict[str, Losses]:
    """{method: losses of its runs of the grid}"""
    grid: dict[str, dict[int, float]] = {}
    for result in results:
        run = result["run"]
        if not run["final"] and run["method"] != UNTRAINED:
            grid.setdefault(run["method"], {})[run["exponent"]] = result["means"]["task"]
    return grid


def best_exponent(losses: Losses) -> int | None:
    """The exponent of the lowest finite loss; None if there is none."""
    finite = {exponent: loss for exponent, loss in losses.items() if math.isfinite(loss)}
    return min(finite, key=lambda exponent: finite[exponent], default=None)


def at_edge(losses: Losses) -> bool:
    """Whether the best rate has no worse neighbour on one side, so that it may not be the best of all."""
    best = best_exponent(losses)
    return best is None or best - 1 not in losses or best + 1 not in losses


def next_exponents(method: Method, losses: Losses) -> list[int]:
    """The rates to try next: those of the first grid, then beyond its edge, until the best one lies inside."""
    missing = [exponent for exponent in method.exponents if exponent not in losses]
    if missing:
        return missing
    best = best_exponent(losses)
    wanted = [min(losses) - 1] if best is None else [best - 1, best + 1]  # all diverged: lower
    low, high = HALF_DECADES
    return [exponent for exponent in wanted if exponent not in losses and low <= exponent <= high]


def next_runs(study: Study, grid: Mapping[str, Losses], finished: Iterable[str], only: Iterable[str] = ()) -> list[Run]:
    """The runs that can be made now, in order: method by method, its rates, then its seeds.

    Args:
        grid: {method: losses of its runs of the grid}
        finished: names of final runs that are done.
        only: names of methods; none is all.
    """
    runs: list[Run] = []
    done = set(finished)
    for method in study.methods:
        if only and method.name not in only:
            continue
        losses = grid.get(method.name, {})
        rates = next_exponents(method, losses)
        runs += [Run(method.name, exponent, study.grid_seed, final=False) for exponent in rates]
        best = best_exponent(losses)
        if not rates and best is not None:
            final = [Run(method.name, best, seed, final=True) for seed in study.seeds]
            runs += [run for run in final if run.name not in done]
    return runs
