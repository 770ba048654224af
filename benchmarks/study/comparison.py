"""Whether two methods differ: a paired bootstrap over seeds and rows, corrected for many comparisons."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

DRAWS = 10_000
LEVEL = 0.95


class Difference(NamedTuple):
    """Mean of paired differences, its interval at `LEVEL`, and the two-sided p that it is 0."""

    mean: float
    low: float
    high: float
    p: float


def difference(values: Any, control: Any, seed: int = 0) -> Difference:
    """The mean of values - control, with seeds and rows drawn anew (hierarchical, both levels with replacement).

    Args:
        values, control: (seeds, rows); the same seeds and the same rows in both.
    """
    pairs = np.asarray(values, float) - np.asarray(control, float)
    seeds, rows = pairs.shape
    random = np.random.default_rng(seed)
    of_seeds = random.multinomial(seeds, [1 / seeds] * seeds, DRAWS) / seeds
    of_rows = random.multinomial(rows, [1 / rows] * rows, DRAWS) / rows
    means = ((of_seeds @ pairs) * of_rows).sum(1)
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    p = 2 * min((means <= 0).mean(), (means >= 0).mean())
    return Difference(float(pairs.mean()), float(low), float(high), float(min(max(p, 2 / DRAWS), 1)))


def holm(ps: Mapping[str, float]) -> dict[str, float]:
    """Each p adjusted so that the chance of any false difference among all stays at its level (Holm 1979)."""
    adjusted: dict[str, float] = {}
    largest = 0.0
    for place, name in enumerate(sorted(ps, key=lambda name: ps[name])):
        largest = max(largest, min(1.0, ps[name] * (len(ps) - place)))
        adjusted[name] = largest
    return adjusted


def verdict(found: Difference, adjusted: float, margin: float) -> str:
    """In words: a difference that is there, one that is below the margin fixed beforehand, or neither."""
    same = -margin < found.low and found.high < margin
    if adjusted < 1 - LEVEL:
        side = "lower" if found.mean < 0 else "higher"
        return f"{side}, by less than {margin:g}" if same else side
    return f"equal within {margin:g}" if same else "undecided"
