"""The recipes in examples/llamafactory: the tiny one runs as its first line says, the other is one that can be read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from builders.llamafactory_runs import sorsa

from sorsa_llamafactory.recipe import translated

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples" / "llamafactory"


@pytest.mark.hosts
def test_the_tiny_recipe_runs_from_the_root_of_a_clone(tmp_path):
    recipe = EXAMPLES / "tiny.yaml"
    command = recipe.read_text().splitlines()[0].partition("sorsa llamafactory ")[2].split()
    done = sorsa(ROOT, *command, f"output_dir={tmp_path}")
    assert done.returncode == 0, done.stderr[-3000:]
    history = json.loads((tmp_path / "trainer_state.json").read_text())["log_history"]
    losses = [entry["loss"] for entry in history if "loss" in entry]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("name", ["tiny.yaml", "llama-8b.yaml"])
def test_recipes_are_for_sorsa_and_name_their_rate(name):
    recipe = translated(yaml.safe_load((EXAMPLES / name).read_text()))
    assert recipe.options is not None
    assert recipe.arguments["learning_rate"] == recipe.options["learning_rate"]
