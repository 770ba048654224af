"""What a study's runs add up to: rates, tests, matched change, and what is wrong with them. Knows no model."""

from __future__ import annotations

import math
import statistics as stats
from pathlib import Path
from typing import Any

import numpy as np

from .comparison import Difference, difference, holm, verdict
from .design import Study, rate
from .protocol import UNTRAINED, at_edge, best_exponent, grid_of, results_of

AXES = ("task", "brown", "human_eval")
CONTROL = "lora"
NOTHING = 1e-6
"""A relative change of the weights below this is no training."""


class Summary:
    """The runs of a study, sorted.

    Args:
        study: its design.
        folder: of the runs' files.
    """

    def __init__(self, study: Study, folder: Path) -> None:
        results = results_of(folder)
        self.study = study
        self.grid = grid_of(results)
        self.runs = {(r["run"]["method"], r["run"]["exponent"]): r for r in results if not r["run"]["final"]}
        self.finals: dict[str, dict[int, dict[str, Any]]] = {}
        for result in results:
            if result["run"]["final"]:
                self.finals.setdefault(result["run"]["method"], {})[result["run"]["seed"]] = result
        self.machine = results[-1]["machine"]
        self.hours = sum(result["cpu_seconds"] for result in results) / 3600

    @property
    def methods(self) -> list[str]:
        """Those with any run, in the study's order."""
        return [method.name for method in self.study.methods if method.name in self.grid]

    def best(self, method: str) -> dict[str, Any] | None:
        """The run of the grid at a method's best rate."""
        exponent = best_exponent(self.grid[method])
        return None if exponent is None else self.runs[method, exponent]

    def untrained(self, final: bool) -> dict[str, float]:
        """The means of the untrained model."""
        return self.finals[UNTRAINED][0]["means"] if final else self.runs[UNTRAINED, 0]["means"]

    def complete(self) -> list[str]:
        """Methods with a final run of every seed."""
        return [name for name in self.methods if set(self.study.seeds) <= set(self.finals.get(name, {}))]

    def mean(self, method: str, axis: str) -> float:
        """Mean of the final runs."""
        return stats.fmean(self.finals[method][seed]["means"][axis] for seed in self.study.seeds)

    def rows(self, method: str, axis: str) -> list[list[float]]:
        """(seeds, rows) of the final runs."""
        return [self.finals[method][seed]["items"][axis] for seed in self.study.seeds]

    def differences(self, axis: str) -> dict[str, tuple[Difference, float, str]]:
        """{method: (difference to the control, adjusted p, verdict)}"""
        names = [name for name in self.complete() if name != CONTROL]
        if CONTROL not in self.complete():
            return {}
        found = {name: difference(self.rows(name, axis), self.rows(CONTROL, axis)) for name in names}
        adjusted = holm({name: one.p for name, one in found.items()})
        margin = self.study.margins[axis]
        return {name: (one, adjusted[name], verdict(one, adjusted[name], margin)) for name, one in found.items()}

    def matched(self, method: str, change: float) -> dict[str, float] | None:
        """The validation means where the method's rates change the weights by `change`, between the nearest two."""
        points = sorted(
            (run["relative_change"], run["means"])
            for (name, _), run in self.runs.items()
            if name == method and run.get("relative_change", 0) > 0 and math.isfinite(run["means"]["task"])
        )
        changes = [point[0] for point in points]
        if not changes or not changes[0] <= change <= changes[-1]:
            return None
        return {
            axis: float(np.interp(math.log(change), np.log(changes), [means[axis] for _, means in points]))
            for axis in ("task", "brown", "kl")
        }

    def faults(self) -> list[str]:
        """What keeps the study from saying more, a sentence each."""
        found = []
        for name in self.methods:
            losses = self.grid[name]
            best = self.best(name)
            if best is None:
                found.append(f"{name}: every rate diverged.")
            elif best["relative_change"] < NOTHING or best["means"]["task"] >= self.untrained(final=False)["task"]:
                found.append(f"{name}: it did not learn at any rate: is it broken?")
            elif at_edge(losses):
                found.append(f"{name}: its best rate, {best['lr']:g}, lies at the edge of those that were tried.")
            elif name not in self.complete():
                found.append(f"{name}: {len(self.finals.get(name, {}))} of {len(self.study.seeds)} seeds.")
        missing = [method.name for method in self.study.methods if method.name not in self.grid]
        return found + [f"{name}: not run." for name in missing]

    def rates(self) -> list[float]:
        """All rates that were tried."""
        return [rate(exponent) for exponent in sorted({e for losses in self.grid.values() for e in losses})]
