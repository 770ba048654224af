"""The suggested learning rate: it agrees with what was measured, as the result files have it, and falls with d r."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sorsa_plugin.learning_rate import (
    HEALTHY_GAP,
    KNOWN,
    LORA_SHARE,
    SPREAD,
    UNHEALTHY_GAP,
    one_digit,
    suggested_rate,
)

RESULTS = Path(__file__).parent.parent / "benchmarks" / "results"
WIDTH = 128
"""Of the quickstart's base."""


def runs(adapter: str = "sorsa") -> dict[int, list[dict]]:
    """{rank: runs of the sweeps over the learning rate}"""
    found: dict[int, list[dict]] = {}
    for name in ("quickstart_lr", "quickstart_rank"):
        for row in json.loads((RESULTS / f"{name}.json").read_text())["rows"]:
            if row["adapter"] == adapter:
                found.setdefault(row.get("rank", 16), []).append(row)
    return found


@pytest.mark.parametrize("known", [known for known in KNOWN if known.source.startswith("measured")], ids=str)
def test_a_measured_point_is_the_range_of_rates_within_3_points_of_the_best(known):
    rows = runs()[known.rank]
    best = max(row["accuracy"] for row in rows)
    good = [row["lr"] for row in rows if row["accuracy"] >= best - 0.03]
    assert (known.low, known.high) == (min(good), max(good))
    assert known.width == WIDTH
    assert (Path(__file__).parent.parent / known.source.removeprefix("measured, ")).is_file()


def test_far_off_is_where_runs_lost_accuracy():
    for rank, rows in runs().items():
        suggested, best = suggested_rate(WIDTH, rank), max(row["accuracy"] for row in rows)
        for row in rows:
            lost = best - row["accuracy"]
            inside = suggested.low <= row["lr"] <= suggested.high
            assert lost <= 0.351 if inside else lost >= 0.079, row


def test_gaps_are_called_healthy_and_unhealthy_as_they_were():
    for rows in runs().values():
        best = max(row["accuracy"] for row in rows)
        for row in rows:
            assert row["gap_mean"] <= HEALTHY_GAP or row["gap_mean"] >= UNHEALTHY_GAP, "no run tells"
            if row["accuracy"] >= best - 0.03:
                assert row["gap_mean"] <= HEALTHY_GAP
            if row["gap_mean"] >= UNHEALTHY_GAP:
                assert row["accuracy"] <= 0.9


def test_loras_rate_is_to_ours_as_the_best_were():
    loras = max(runs("lora")[16], key=lambda row: row["accuracy"])["lr"]
    (ours,) = [known for known in KNOWN if known.rank == 16]
    assert ours.low <= LORA_SHARE * loras <= ours.high


@pytest.mark.parametrize("known", KNOWN, ids=str)
def test_at_a_known_point_the_rate_is_its_middle_and_the_basis_its_source(known):
    suggested = suggested_rate(known.width, known.rank)
    assert suggested.rate == one_digit((known.low * known.high) ** 0.5)
    assert suggested.basis == known.source


def test_between_known_points_it_is_interpolated_and_beyond_them_extrapolated():
    small = suggested_rate(576, 16)
    assert small.rate == 9e-4
    assert small.basis.startswith("interpolated between width 128, rank 64 (measured")
    assert suggested_rate(4096, 16).rate == 2e-4
    for width, rank, nearest in ((16, 2, KNOWN[0]), (8192, 128, KNOWN[-1])):
        beyond = suggested_rate(width, rank)
        assert beyond.rate == one_digit(nearest.rate)
        assert beyond.basis.startswith(f"extrapolated: the nearest that is known, width {nearest.width}, rank")


@given(width=st.integers(1, 10**5), rank=st.integers(1, 1024))
def test_the_rate_lies_in_its_range_and_falls_with_width_and_rank(width, rank):
    suggested = suggested_rate(width, rank)
    low, middle, high = suggested.sweep
    assert suggested.low <= low < middle == suggested.rate < high <= suggested.high
    assert suggested_rate(width + 1, rank).rate <= suggested.rate
    assert suggested_rate(width, rank + 1).rate <= suggested.rate
    # rounding to one digit moves each end by at most half of its first digit, a third of 1.5
    assert SPREAD**2 / 2.25 <= suggested.high / suggested.low <= SPREAD**2 * 2.25
