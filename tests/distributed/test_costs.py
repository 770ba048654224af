"""What a step sends under every engine, counted at torch's dispatcher, is what docs/scaling.md's formulas say."""

from __future__ import annotations

import json
from typing import Any

import pytest
from builders.processes import run

pytestmark = pytest.mark.distributed

D, WIDE, LAYERS, RANK, VOCABULARY = 36, 99, 2, 3, 256
SHAPES = [(D, D)] * 4 + [(WIDE, D)] * 2 + [(D, WIDE)]
"""Out and in of a layer's weights: q, k, v, o, gate, up, down."""

TRAINED = 4 * LAYERS * sum((out + into + 1) * RANK for out, into in SHAPES)
FROZEN = TRAINED + 4 * LAYERS * sum(out for out, _ in SHAPES)  # and a fingerprint
BASE = 4 * (LAYERS * (sum(out * into for out, into in SHAPES) + 2 * D) + 2 * VOCABULARY * D + D)
GRAM = 4 * LAYERS * 7 * 2 * RANK**2
OUTERMOST = 4 * (2 * VOCABULARY * D + D)  # FSDP2 keeps embedding, head and last norm whole until backward
UNUSED = 4 * (VOCABULARY * D + D + 3 * D * D)  # before the first offset: backward does not come there

SCALARS = 64
"""DeepSpeed also sums up its gradient norm and overflow flags, some bytes."""


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    file = tmp_path_factory.mktemp("costs") / "found.json"
    size = ["--hidden", str(D), "--layers", str(LAYERS), "--rank", str(RANK)]
    run("../../benchmarks/distributed_costs.py", 2, "--worker", str(file), *size)
    return json.loads(file.read_text())


def test_the_sizes_are_those_of_the_formulas(found: dict[str, Any]) -> None:
    for one in found.values():
        assert (one["base"], one["frozen"], one["trained"], one["gram"]) == (BASE, FROZEN, TRAINED, GRAM)


def test_the_regularizer_costs_nothing_under_ddp(found: dict[str, Any]) -> None:
    assert found["DDP"]["engine"] == "WholeFactors"
    assert found["DDP"]["with"] == found["DDP"]["without"]
    assert found["DDP"]["without"]["all-reduce"][1] == TRAINED


def test_under_fsdp2_the_regularizer_is_one_all_reduce_of_all_r_by_r_matrices(found: dict[str, Any]) -> None:
    assert found["FSDP2"]["engine"] == "FSDP2"
    assert found["FSDP2"]["with"] == found["FSDP2"]["without"] | {"all-reduce": [1, GRAM]}


def test_under_fsdp2_training_gathers_all_twice_and_scatters_gradients(found: dict[str, Any]) -> None:
    expected = {
        "all-gather": [2 * LAYERS + 1, 2 * (BASE + FROZEN + TRAINED) - OUTERMOST],
        "reduce-scatter": [LAYERS, TRAINED],
    }
    # rows are padded to a multiple of the processes: here up to one row of each factor and weight with odd rows
    sent = found["FSDP2"]["without"]
    assert {kind: count for kind, (count, _) in sent.items()} == {kind: count for kind, (count, _) in expected.items()}
    odd = LAYERS * 2 * 4 * (2 * D + 3 * 2 * RANK + 2 + 7 * 2)
    for kind, (_, size) in expected.items():
        assert size <= sent[kind][1] <= size + 2 * odd, kind


@pytest.mark.parametrize("name", ["ZeRO 1", "ZeRO 2", "ZeRO 3"])
def test_under_zero_the_regularizer_adds_one_all_reduce_for_rows_that_are_cut(name: str, found: dict[str, Any]) -> None:
    one = found[name]
    assert one["engine"] == ("ZeRO3" if name == "ZeRO 3" else "ZeRO12")
    calls, size = (a - b for a, b in zip(one["with"]["all-reduce"], one["without"]["all-reduce"], strict=True))
    assert (calls, size) == (1 + (one["cut"] > 0), GRAM + one["cut"])
    assert one["cut"] <= 4 * one["factors"] * RANK  # at most one row of each factor between two processes
    others = {kind: sent for kind, sent in one["without"].items() if kind != "all-reduce"}
    assert others == {kind: sent for kind, sent in one["with"].items() if kind != "all-reduce"}


def test_some_rows_are_cut(found: dict[str, Any]) -> None:
    assert found["ZeRO 3"]["cut"] > 0


def test_under_zero_training_sends_what_the_formulas_say(found: dict[str, Any]) -> None:
    for name in ("ZeRO 1", "ZeRO 2"):
        sent = found[name]["without"]
        assert TRAINED <= sent["all-reduce"][1] <= TRAINED + SCALARS
        assert TRAINED <= sent["all-gather"][1] <= TRAINED + SCALARS  # padded to whole partitions
    sent = found["ZeRO 3"]["without"]
    padding = 4 * 2 * (LAYERS * (7 * 4 + 2) + 3)  # each parameter may get an element more, in each of two gathers
    gathered = 2 * (BASE + TRAINED) - UNUSED
    assert gathered <= sent["all-gather"][1] <= gathered + padding
    assert TRAINED <= sent["reduce-scatter"][1] <= TRAINED + padding
