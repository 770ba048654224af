"""A learning rate to start from, by a model's width and the rank: a line drawn through the few rates that are known.

Adam's step moves each entry of a factor P (d x r) by about the rate, so what it does to the unit columns of P grows
with d and with r. The rule is therefore a function of d r alone: the line through `KNOWN` in log-log. Its slope is
-0.6 to -0.8 where it was measured, over the rank at d 128, and -0.84 from there to the published rate.

How sure it is: three points are sweeps of one small task, one seed each. Between d r of 8192 and 524288 there is no
point, and the far one is published and was not swept here. A pilot on SmolLM2-135M (d 576, r 16), whose numbers are not
in the repository, did best at 1e-3; the line says 9e-4 and was not drawn through it. So a sweep of three rates is worth
more than the rule. All points are AdamW's, with gamma 4e-4, coupled, and a cosine schedule.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

SPREAD = 4.0
"""A rate is far off where it is more than this factor from the suggested one. Of the runs of
benchmarks/results/quickstart_{lr,rank}.json those inside lost at most 35 points of exact match to the best of their
rank, those outside 8 to 99."""

SWEPT = 3.0
"""The factor between the rates of a sweep."""

LORA_SHARE = 0.2
"""SORSA's best rate over LoRA's on the quickstart's task: 2e-3 to 5e-3 over 1e-2 to 2e-2, geometric means
(benchmarks/results/quickstart_lr.json). One task, width 128, rank 16."""

HEALTHY_GAP = 0.6
"""Mean gap up to which every run of quickstart_{lr,rank}.json near the best rate reached 96% or more."""

UNHEALTHY_GAP = 1.5
"""Mean gap above which every run of these lost accuracy: 90% and 88% at 1.7, 4% at 7.4 and 9.8."""


@dataclass(frozen=True)
class KnownRate:
    """Rates that are known to train well at one width and rank."""

    width: int
    rank: int
    low: float
    high: float
    source: str

    @property
    def size(self) -> int:
        """d r"""
        return self.width * self.rank

    @property
    def rate(self) -> float:
        """Their geometric mean."""
        return math.sqrt(self.low * self.high)


KNOWN = (
    KnownRate(128, 4, 5e-3, 1e-2, "measured, benchmarks/results/quickstart_rank.json"),
    KnownRate(128, 16, 2e-3, 5e-3, "measured, benchmarks/results/quickstart_lr.json"),
    KnownRate(128, 64, 5e-4, 2e-3, "measured, benchmarks/results/quickstart_rank.json"),
    KnownRate(4096, 128, 3e-5, 3e-5, "published for 7B models, arXiv 2409.00055"),
)
"""By d r, ascending. Low to high: within 3 points of the best exact match of the grid."""


@dataclass(frozen=True)
class SuggestedRate:
    """What `suggested_rate` found.

    Attributes:
        rate: where to start, rounded to one digit as all of these.
        low, high: a rate outside of them is far off.
        sweep: three rates to try.
        basis: what it rests on: measured, published, interpolated or extrapolated, and from what.
    """

    rate: float
    low: float
    high: float
    sweep: tuple[float, float, float]
    basis: str


def suggested_rate(width: int, rank: int) -> SuggestedRate:
    """A peak learning rate for AdamW, with the range around it.

    Args:
        width: hidden size d of the model.
        rank: r, triplets trained per weight.
    """
    rate, basis = _on_the_line(width * rank)
    basis = next((known.source for known in KNOWN if (known.width, known.rank) == (width, rank)), basis)
    return SuggestedRate(
        rate=one_digit(rate),
        low=one_digit(rate / SPREAD),
        high=one_digit(rate * SPREAD),
        sweep=(one_digit(rate / SWEPT), one_digit(rate), one_digit(rate * SWEPT)),
        basis=basis,
    )


def one_digit(rate: float) -> float:
    """A rate rounded to its first digit: no more of it is known."""
    return float(f"{rate:.0e}")


def _on_the_line(size: int) -> tuple[float, str]:
    """The rate at d r, constant beyond the known points, and its basis."""
    for known, beyond in ((KNOWN[0], size < KNOWN[0].size), (KNOWN[-1], size > KNOWN[-1].size)):
        if beyond:
            return known.rate, f"extrapolated: the nearest that is known, {_named(known)}"
    below, above = next((below, above) for below, above in pairwise(KNOWN) if size <= above.size)
    share = math.log(size / below.size) / math.log(above.size / below.size)
    rate = below.rate ** (1 - share) * above.rate**share
    return rate, f"interpolated between {_named(below)}, and {_named(above)}"


def _named(known: KnownRate) -> str:
    return f"width {known.width}, rank {known.rank} ({known.source})"
