"""Whether two methods differ: the bootstrap has the coverage it claims, and Holm's correction its published values."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from study.comparison import Difference, difference, holm, verdict


def test_a_difference_of_every_pair_is_found_exactly():
    control = np.random.default_rng(0).normal(size=(5, 40))
    found = difference(control - 0.25, control)
    assert (found.mean, found.low, found.high) == pytest.approx((-0.25,) * 3)
    assert found.p == 2 / 10_000  # the least that so many draws can tell


def test_the_interval_holds_the_truth_about_as_often_as_it_claims():
    random = np.random.default_rng(1)
    inside = 0
    for _ in range(60):
        seeds, rows = random.normal(0, 0.2, (8, 1)), random.normal(0, 0.5, (1, 20))
        pairs = 0.1 + seeds + rows + random.normal(0, 0.5, (8, 20))
        found = difference(pairs, np.zeros_like(pairs))
        inside += found.low <= 0.1 <= found.high
    # 95% of 60, less what so few seeds cost a bootstrap: three standard deviations of a binomial below 90%
    assert inside >= 54 - 3 * (60 * 0.9 * 0.1) ** 0.5


def test_seeds_widen_the_interval_and_not_only_rows():
    random = np.random.default_rng(2)
    rows = random.normal(0, 0.1, (4, 200))
    alike, apart = (difference(rows + shift, 0 * rows) for shift in (0, np.array([[-1], [1], [-1], [1]])))
    assert apart.high - apart.low > 10 * (alike.high - alike.low)


def test_holms_correction_is_that_of_its_definition():
    # by hand: 0.01 x 4, 0.02 x 3, 0.03 x 2, and 0.9, each no less than the one before
    adjusted = holm({"d": 0.9, "b": 0.02, "a": 0.01, "c": 0.03})
    assert adjusted == pytest.approx({"a": 0.04, "b": 0.06, "c": 0.06, "d": 0.9})


@given(st.dictionaries(st.text(), st.floats(0, 1), min_size=1))
def test_corrected_values_are_no_smaller_and_keep_their_order(ps):
    adjusted = holm(ps)
    names = sorted(ps, key=lambda name: ps[name])
    assert all(ps[name] <= adjusted[name] <= 1 for name in names)
    assert [adjusted[name] for name in names] == sorted(adjusted.values())


@pytest.mark.parametrize(
    ("low", "high", "p", "words"),
    [
        (-0.03, -0.02, 0.001, "lower"),
        (0.02, 0.03, 0.001, "higher"),
        (0.001, 0.005, 0.001, "higher, by less than 0.01"),
        (-0.005, 0.005, 0.9, "equal within 0.01"),
        (-0.005, 0.02, 0.3, "undecided"),
        (-0.03, -0.001, 0.2, "undecided"),  # its own interval tells them apart, among so many it does not
    ],
)
def test_the_verdict_needs_both_the_interval_and_the_corrected_p(low, high, p, words):
    assert verdict(Difference((low + high) / 2, low, high, p), p, margin=0.01) == words
