"""Which run comes next: the search for a rate ends only where the best one lies inside, and seeds come after it."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from study.design import HALF_DECADES, Method, read_study
from study.protocol import Run, at_edge, best_exponent, next_exponents, next_runs

STUDIES = sorted((Path(__file__).parents[2] / "benchmarks" / "study").glob("*.yaml"))
METHOD = Method("lora", "lora", (-7, -6, -5, -4, -3))
LOW, HIGH = HALF_DECADES


def search(loss, method: Method = METHOD) -> dict[int, float]:
    """The grid that the search ends with, where `loss` is that of each exponent."""
    losses: dict[int, float] = {}
    while exponents := next_exponents(method, losses):
        losses.update({exponent: loss(exponent) for exponent in exponents})
    return losses


@given(best=st.integers(LOW + 1, HIGH - 1), diverges=st.integers(1, 6))
def test_the_search_finds_the_best_rate_wherever_it_is_and_tries_its_neighbours(best, diverges):
    losses = search(lambda exponent: math.inf if exponent >= best + diverges else abs(exponent - best))
    assert best_exponent(losses) == best
    assert not at_edge(losses)
    assert {best - 1, best, best + 1, *METHOD.exponents} <= losses.keys()


@pytest.mark.parametrize("sign", [-1, 1])
def test_a_best_rate_at_the_end_of_all_rates_counts_as_one_at_the_edge(sign):
    losses = search(lambda exponent: sign * exponent)
    assert best_exponent(losses) == (LOW if sign > 0 else HIGH)
    assert at_edge(losses)


def test_where_every_rate_diverges_the_search_goes_down_and_ends():
    losses = search(lambda exponent: math.nan)
    assert min(losses) == LOW
    assert best_exponent(losses) is None
    assert at_edge(losses)


@pytest.fixture(params=STUDIES, ids=lambda path: path.stem)
def study(request):
    return read_study(request.param)


def test_seeds_of_a_method_come_once_its_rate_is_found_and_those_that_are_done_do_not(study):
    method = study.methods[0]
    first = next_runs(study, {}, [], [method.name])
    assert first == [Run(method.name, exponent, study.grid_seed, False) for exponent in method.exponents]
    middle = method.exponents[2]
    grid = {method.name: {exponent: float(abs(exponent - middle)) for exponent in method.exponents}}
    final = next_runs(study, grid, [], [method.name])
    assert final == [Run(method.name, middle, seed, True) for seed in study.seeds]
    assert next_runs(study, grid, [final[0].name], [method.name]) == final[1:]
    assert next_runs(study, grid, [run.name for run in final], [method.name]) == []


def test_without_a_choice_every_method_is_run(study):
    assert {run.method for run in next_runs(study, {}, [])} == {method.name for method in study.methods}


def test_the_seed_that_chose_the_rate_is_none_of_those_that_test_it(study):
    assert study.grid_seed not in study.seeds
    assert len(study.seeds) >= 5
    assert all(len(method.exponents) >= 5 for method in study.methods)
    assert study.margins.keys() == {"task", "brown", "human_eval"}


def test_gamma_follows_the_rate_as_a_weight_of_the_loss(study):
    method = next(method for method in study.methods if method.gamma_over_rate)
    block = method.recipe(study, 1e-3)["sorsa"]
    assert block["gamma"] == pytest.approx(method.gamma_over_rate * 1e-3)
    assert replace(method, gamma_over_rate=None).recipe(study, 1e-3)["sorsa"] == {}


def test_a_study_with_an_unknown_key_is_a_sentence(tmp_path):
    path = tmp_path / "odd.yaml"
    path.write_text(STUDIES[0].read_text() + "stepz: 3\n")
    with pytest.raises(ValueError, match="has other keys than a study: stepz"):
        read_study(path)
