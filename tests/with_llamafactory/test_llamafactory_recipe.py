"""What a recipe for SORSA becomes, and the sentences for what it cannot mean."""

from __future__ import annotations

import pytest

from sorsa_llamafactory.recipe import REFUSED, translated
from sorsa_plugin.errors import AdapterOptionsError, ForeignAdapterError, SORSAConfigError


def test_a_recipe_for_sorsa_becomes_one_that_llamafactory_can_read():
    recipe = translated({"finetuning_type": "sorsa", "lora_rank": 8, "sorsa": {"gamma": 0.0}, "stage": "sft"})
    assert recipe.arguments == {"finetuning_type": "lora", "lora_rank": 8, "stage": "sft"}
    assert recipe.options == {"gamma": 0.0}


def test_the_blocks_learning_rate_is_the_recipes_and_says_so(caplog):
    recipe = translated({"finetuning_type": "sorsa", "learning_rate": 1e-4, "sorsa": {"learning_rate": 2e-3}})
    assert recipe.arguments["learning_rate"] == 2e-3
    assert "learning_rate is 0.002, as the block sorsa says" in caplog.text


def test_one_word_switches_back_and_the_block_may_stay(caplog):
    recipe = translated({"finetuning_type": "lora", "learning_rate": 1e-4, "sorsa": {"learning_rate": 2e-3}})
    assert recipe.arguments == {"finetuning_type": "lora", "learning_rate": 1e-4}
    assert recipe.options is None
    assert "the block sorsa is not used" in caplog.text


def test_flags_of_the_command_line_switch_too():
    for flags in (["--finetuning_type", "sorsa"], ["--finetuning_type=sorsa"]):
        recipe = translated(["--stage", "sft", *flags, "--lora_rank", "8"])
        assert recipe.arguments == ["--stage", "sft", "--finetuning_type", "lora", "--lora_rank", "8"]
        assert recipe.options == {}
    assert translated(["--finetuning_type", "lora"]).options is None


@pytest.mark.parametrize("key", REFUSED)
def test_what_asks_for_another_method_is_refused_with_the_reason(key):
    with pytest.raises(AdapterOptionsError, match=f"{key}: .*Delete it"):
        translated({"finetuning_type": "sorsa", key: True})
    with pytest.raises(AdapterOptionsError, match=f"{key}: .*Delete it"):
        translated(["--finetuning_type", "sorsa", f"--{key}", "--stage", "sft"])


def test_options_of_the_block_are_checked_before_a_model_is_loaded():
    with pytest.raises(AdapterOptionsError, match="gamma"):
        translated({"finetuning_type": "sorsa", "sorsa": {"gama": 1}})
    with pytest.raises(SORSAConfigError, match="gamma is -1"):
        translated({"finetuning_type": "sorsa", "sorsa": {"gamma": -1}})
    with pytest.raises(AdapterOptionsError, match="gamma belongs into the block"):
        translated({"finetuning_type": "sorsa", "gamma": 1e-3})


def test_training_does_not_go_on_with_another_methods_adapter(tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    recipe = {"finetuning_type": "sorsa", "do_train": True, "adapter_name_or_path": str(tmp_path)}
    with pytest.raises(ForeignAdapterError, match="says peft_type 'LORA'"):
        translated(recipe)
    assert translated({**recipe, "create_new_adapter": True}).options == {}
    flags = ["--do_train", "--adapter_name_or_path", f"other,{tmp_path}", "--finetuning_type=sorsa"]
    with pytest.raises(ForeignAdapterError, match="says peft_type 'LORA'"):
        translated(flags)
