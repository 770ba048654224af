"""The time of a factorisation is measured on each shape once, or scaled from a speed that is given."""

from __future__ import annotations

import pytest

import sorsa_plugin.tools.init_time
from sorsa_plugin import SORSAConfig
from sorsa_plugin.tools.init_time import estimate_init
from sorsa_plugin.tools.layer_groups import LayerGroup


def test_a_given_speed_is_scaled_by_the_elements_and_the_rank():
    groups = (LayerGroup("a", (4096, 4096), 8, 3), LayerGroup("b", (8192, 4096), 4, 1))
    seconds, basis = estimate_init(groups, SORSAConfig(r=8), 0.5)
    assert seconds == pytest.approx(3 * 0.5 + 2 * 0.5 * 0.5)
    assert basis == "given: 0.5 s for one 4096 x 4096 weight at rank 8"


def test_a_measured_speed_is_of_each_shape_once_and_large_ones_scaled(monkeypatch):
    calls, clock = [], iter(range(1000))
    monkeypatch.setattr(sorsa_plugin.tools.init_time, "factorise", lambda w, r, **k: calls.append((tuple(w.shape), r)))
    monkeypatch.setattr(sorsa_plugin.tools.init_time.time, "perf_counter", lambda: float(next(clock)))  # each takes 1 s
    groups = (
        LayerGroup("a", (2048, 2048), 8, 3),
        LayerGroup("b", (2048, 2048), 8, 2),
        LayerGroup("c", (8192, 2048), 8, 1),
        LayerGroup("d", (8192, 8192), 1024, 1),  # not below 4 r
    )
    seconds, basis = estimate_init(groups, SORSAConfig(r=8), None)
    assert calls[1:] == [((2048, 2048), 8), ((4096, 1024), 8), ((4096, 4096), 1024)]
    assert seconds == pytest.approx(3 + 2 + 4 + 4)
    assert basis.startswith("measured on this machine's cpu")


def test_what_is_timed_stops_where_the_adapter_will(monkeypatch):
    given = []
    monkeypatch.setattr(sorsa_plugin.tools.init_time, "factorise", lambda w, r, **options: given.append(options))
    estimate_init((LayerGroup("a", (512, 512), 8, 1),), SORSAConfig(r=8, svd="randomized", svd_energy=0.9), None)
    assert given[-1] == {"svd": "randomized", "energy": 0.9}
