"""A run that was killed and resumed in a new process is the run that was never interrupted, bit for bit."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from promises.resumable_run import LR, OPTIONS, SAVED_AT, STEPS

UPDATES = list(OPTIONS)
WEIGHTS = "adapter_model.safetensors"


def start(directory: Path, *modes: str) -> dict[str, list[int]]:
    """How the runs of resumable_run.py ended, in a fresh interpreter."""
    result = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("resumable_run.py")), str(directory), *modes],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
        check=True,
        timeout=300,
        stdout=subprocess.PIPE,
        text=True,
    )
    return json.loads(result.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For each update: a whole run, and one that is killed and resumed by another interpreter."""
    directory = tmp_path_factory.mktemp("runs")
    each = len(UPDATES)
    assert start(directory, "whole", "killed") == {"whole": [0] * each, "killed": [-signal.SIGKILL] * each}
    for update in UPDATES:
        checkpoints = [path.name for path in (directory / update / "killed" / "run").iterdir()]
        assert checkpoints == [f"checkpoint-{SAVED_AT}"]
    assert start(directory, "resumed") == {"resumed": [0] * each}
    return directory


def log(runs: Path, update: str, mode: str) -> dict[str, Any]:
    return json.loads((runs / update / f"log-{mode}.json").read_text())


@pytest.mark.parametrize("update", UPDATES)
def test_every_logged_number_is_the_same(runs: Path, update: str) -> None:
    """Losses, gradient norms, learning rates, gaps: equal as floats, not nearly."""
    whole, resumed = (log(runs, update, mode)["history"] for mode in ("whole", "resumed"))
    assert [entry["step"] for entry in whole if "loss" in entry] == list(range(1, STEPS + 1))
    assert all("sorsa/gap_mean" in entry for entry in whole)
    assert resumed == whole


@pytest.mark.parametrize("update", UPDATES)
def test_final_adapter_files_are_byte_equal(runs: Path, update: str) -> None:
    whole, resumed = (runs / update / f"final-{mode}" for mode in ("whole", "resumed"))
    assert (resumed / WEIGHTS).read_bytes() == (whole / WEIGHTS).read_bytes()
    configs = [json.loads((path / "adapter_config.json").read_text()) for path in (whole, resumed)]
    for config in configs:
        config["target_modules"].sort()  # PEFT writes a set
    assert configs[0] == configs[1]


@pytest.mark.parametrize("update", UPDATES)
def test_only_the_remaining_steps_are_made_at_the_first_runs_peak_rate(runs: Path, update: str) -> None:
    assert log(runs, update, "whole")["steps"] == STEPS
    assert log(runs, update, "resumed")["steps"] == STEPS - SAVED_AT
    assert log(runs, update, "resumed")["eta_max"] == log(runs, update, "whole")["eta_max"] == [LR]
