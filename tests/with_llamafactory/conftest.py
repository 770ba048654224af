"""A folder of tiny data, and a function that trains a recipe in it."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from builders.llamafactory_runs import FILES, LAYOUTS, RECIPE, sorsa

Train = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llamafactory")
    (folder / "data").mkdir()
    for name, rows in FILES.items():
        (folder / "data" / f"{name}.json").write_text(json.dumps(rows))
    info = {name: {"file_name": f"{name}.json", **LAYOUTS.get(name, {})} for name in FILES}
    (folder / "data" / "dataset_info.json").write_text(json.dumps(info))
    return folder


@pytest.fixture(scope="session")
def train(folder: Path) -> Train:
    """Runs a recipe into the folder `output`; `changes` are its keys that differ from RECIPE."""

    def run(
        output: str, environment: dict[str, str] | None = None, **changes: object
    ) -> subprocess.CompletedProcess[str]:
        recipe = {key: value for key, value in {**RECIPE, "output_dir": output, **changes}.items() if value is not None}
        (folder / f"{output}.yaml").write_text(yaml.safe_dump(recipe))
        return sorsa(folder, "train", f"{output}.yaml", environment=environment)

    return run
