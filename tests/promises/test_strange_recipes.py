"""Whatever a recipe of `sorsa sft` or `sorsa dpo` says, it is accepted or refused in a sentence before anything starts.

Values of every type take the place of each key and of each option of a block, one at a time.
"""

from __future__ import annotations

import contextlib
import io
from pathlib import Path
from typing import Any

import pytest
import yaml

from sorsa_plugin import setup_adapter
from sorsa_plugin.errors import SORSAError

pytest.importorskip("trl")

from sorsa_trl.recipe import RecipeParser

pytestmark = pytest.mark.slow

VALUES = [
    None, True, False, 0, -1, 3.5, 10**30, 1e26, float("nan"), "", "x", "\x00", "é" * 300, "(", "1e-4", [], [5],
    [None], [[]], {}, {"x": 5}, {"x": None}, {"(": 3}, {5: 5},
]  # fmt: skip

RECIPE: dict[str, Any] = {
    "model_name_or_path": "model",
    "dataset_name": "data",
    "output_dir": "out",
    "adapter": "sorsa",
    "use_cpu": True,
    "bf16": False,
    "r": 4,
    "sorsa": {},
}

KEYS = [
    "adapter", "r", "lora_r", "lora_alpha", "dropout", "target_modules", "exclude_modules", "modules_to_save",
    "layers_to_transform", "layers_pattern", "rank_pattern", "target_parameters", "trainable_token_indices",
    "task_type", "sorsa", "learning_rate", "max_steps", "model_name_or_path", "dataset_name", "datasets", "report_to",
    "resume_from_checkpoint", "adapter_options", "unheard_of", "num_processes", "gradient_checkpointing_kwargs",
]  # fmt: skip

BLOCK = [
    "gamma", "reg_update", "reg_schedule", "svd", "svd_seed", "svd_energy", "init_weights", "learning_rate",
    "residual_base", "full_precision_base", "fan_in_fan_out", "ensure_weight_tying", "unheard_of",
]  # fmt: skip


def refusal(command: str, recipe: dict[str, Any], folder: Path) -> str | None:
    """What is wrong with how a recipe ends; None if it is accepted, or refused in a sentence."""
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            parsed = RecipeParser(command).parse(["--config", str(path)])
            parsed.require_model()
            setup_adapter(parsed.adapter)
    except SORSAError as error:
        return None if len(str(error)) > 20 else f"says only {error!r}"
    except SystemExit as error:  # argparse's own sentence
        return None if error.code == 2 else f"exits with {error.code}"
    except Exception as error:
        return f"ends in {type(error).__name__}: {str(error)[:100]}"
    return None


def test_the_recipe_itself_is_accepted(tmp_path):
    assert refusal("sft", RECIPE, tmp_path) is None
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    assert setup_adapter(RecipeParser("sft").parse(["--config", str(tmp_path / "recipe.yaml")]).adapter).peft_config


@pytest.mark.parametrize("command", ["sft", "dpo"])
def test_every_value_of_every_key_is_accepted_or_refused_in_a_sentence(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    wrong = []
    for key in KEYS:
        for value in VALUES:
            problem = refusal(command, RECIPE | {key: value}, tmp_path)
            wrong += [f"{key}: {value!r} {problem}"[:200]] if problem else []
    assert not wrong, "\n" + "\n".join(wrong)


def test_every_value_of_every_option_of_the_block_is_accepted_or_refused_in_a_sentence(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    wrong = []
    for key in BLOCK:
        for value in VALUES:
            problem = refusal("sft", RECIPE | {"sorsa": {key: value}}, tmp_path)
            wrong += [f"sorsa.{key}: {value!r} {problem}"[:200]] if problem else []
    assert not wrong, "\n" + "\n".join(wrong)
