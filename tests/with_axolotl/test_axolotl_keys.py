"""Keys of an Axolotl recipe that would be dropped in silence, and the block's learning rate. Needs no Axolotl."""

from __future__ import annotations

from typing import Any

import pytest

from sorsa_axolotl.args import SORSAArgs, SORSABlock
from sorsa_axolotl.recipe import refuse_stray, use_the_blocks_rate
from sorsa_plugin.errors import AdapterOptionsError

RECIPE: dict[str, Any] = {"adapter": "sorsa", "lora_r": 8, "lora_target_linear": True, "learning_rate": 2e-4}


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"gamma": 1e-3}, "gamma belongs into the block: `sorsa: {gamma: ...}`."),
        ({"reg_update": "decoupled"}, "reg_update belongs into the block: `sorsa: {reg_update: ...}`."),
        ({"sorsa_svd": "exact"}, "sorsa_svd belongs into the block: `sorsa: {svd: ...}`."),
        ({"sorsa_learning_rate": 1e-3}, "sorsa_learning_rate belongs into the block: `sorsa: {learning_rate: ...}`."),
        ({"sorsa_r": 8}, "sorsa_r is read by nobody. Write lora_r."),
        ({"sorsa_dropout": 0.1}, "sorsa_dropout is read by nobody. Write lora_dropout."),
        ({"sorsa_target_modules": ["q_proj"]}, "read by nobody. Write lora_target_modules."),
        ({"sorsa_zzz": 1}, "sorsa_zzz is read by nobody. Delete the line."),
    ],
    ids=lambda value: str(value)[:30],
)
def test_an_option_that_stands_where_nobody_reads_it_is_an_error(keys: dict[str, Any], message: str) -> None:
    for adapter in ("sorsa", "qsorsa"):
        with pytest.raises(AdapterOptionsError) as error:
            SORSAArgs.check_sorsa_keys({**RECIPE, "adapter": adapter, **keys})
        assert f"adapter: {adapter} cannot honour this recipe." in str(error.value)
        assert message in str(error.value)
    SORSAArgs.check_sorsa_keys({**RECIPE, "adapter": "lora", **keys})


def test_all_of_them_are_named_at_once() -> None:
    with pytest.raises(AdapterOptionsError, match=r"(?s)gamma belongs.*sorsa_r is read by nobody"):
        refuse_stray({**RECIPE, "gamma": 1, "sorsa_r": 1}, SORSABlock.model_fields)


def test_a_recipe_without_stray_keys_passes() -> None:
    refuse_stray({**RECIPE, "sorsa": {"gamma": 0.1}, "lora_dropout": 0.1}, SORSABlock.model_fields)


def test_the_blocks_rate_takes_the_place_of_the_recipes_and_one_line_says_so(caplog: pytest.LogCaptureFixture) -> None:
    recipe = {**RECIPE, "sorsa": {"learning_rate": 1e-3}}
    for _ in range(2):  # Axolotl validates more than once
        recipe = SORSAArgs.check_sorsa_keys(recipe)
        assert recipe["learning_rate"] == 1e-3
    assert caplog.text.count("learning_rate is 0.001, as the sorsa block says; 0.0002 is for other adapters.") == 1
    switched = {**RECIPE, "adapter": "lora", "sorsa": {"learning_rate": 1e-3}}
    assert SORSAArgs.check_sorsa_keys(switched)["learning_rate"] == 2e-4


def test_the_blocks_rate_may_stand_alone() -> None:
    recipe = {"adapter": "sorsa", "sorsa": {"learning_rate": "1e-3"}}  # a word in YAML 1.1; the schema reads both
    use_the_blocks_rate(recipe)
    assert recipe["learning_rate"] == "1e-3"
    assert SORSABlock(learning_rate="1e-3").learning_rate == 1e-3
    with pytest.raises(ValueError, match="greater than 0"):
        SORSABlock(learning_rate=0)
