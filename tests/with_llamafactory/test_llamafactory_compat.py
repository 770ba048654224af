"""Every name of LLaMA-Factory that the integration replaces is there, and is looked up where it is replaced."""

from __future__ import annotations

import inspect

import pytest

pytestmark = pytest.mark.hosts

pytest.importorskip("llamafactory")


def test_every_entry_is_there() -> None:
    from sorsa_llamafactory import llamafactory_compat

    for dotted in llamafactory_compat.ENTRIES:
        module, name = dotted.split(".")
        assert hasattr(getattr(llamafactory_compat, module), name), dotted


def test_a_new_adapters_config_comes_from_the_name_that_is_replaced() -> None:
    from sorsa_llamafactory.llamafactory_compat import adapter

    source = inspect.getsource(adapter._setup_lora_tuning)
    assert "peft_config = LoraConfig(" in source
    for argument in ('"r":', '"target_modules":', '"lora_dropout":', '"modules_to_save":'):
        assert argument in source


def test_recipes_are_read_by_the_function_that_is_replaced() -> None:
    from sorsa_llamafactory.llamafactory_compat import parser, tuner

    assert "args = read_args(args)" in inspect.getsource(parser._parse_args)
    assert "args = read_args(args)" in inspect.getsource(tuner.run_exp)


def test_torchrun_starts_the_file_that_is_replaced() -> None:
    from sorsa_llamafactory.llamafactory_compat import launcher

    assert inspect.getsource(launcher.launch).count("file_name=__file__") == 2
