"""The runs that several tests look at: one LoRA and one SORSA training."""

from __future__ import annotations

from pathlib import Path

import pytest
from builders.axolotl_runs import LORA_RECIPE, SORSA_RECIPE, Run, trained


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("axolotl")


@pytest.fixture(scope="session")
def lora_run(runs: Path) -> Run:
    return trained(LORA_RECIPE, runs / "lora")


@pytest.fixture(scope="session")
def sorsa_run(runs: Path) -> Run:
    return trained(SORSA_RECIPE, runs / "sorsa")
