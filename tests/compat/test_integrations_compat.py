"""Every private name of the Trainer, TRL and their command lines that the integrations use is there."""

from __future__ import annotations

from types import ModuleType

import pytest
import transformers.trainer
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import CallbackHandler

from sorsa_plugin import SORSAConfig
from sorsa_transformers import SORSACallback, trainer_compat
from sorsa_transformers.metrics import SORSAMetrics
from sorsa_trl import trl_compat
from sorsa_trl.recipe import RecipeParser


@pytest.mark.parametrize("module", [trainer_compat, trl_compat], ids=lambda module: module.__name__)
def test_every_entry_has_a_name(module: ModuleType) -> None:
    assert all(hasattr(module, name) for name in module.ENTRIES)


def test_a_trainer_has_what_the_callback_calls_and_replaces(tmp_path) -> None:
    import torch

    trainer = Trainer(torch.nn.Linear(1, 1), TrainingArguments(str(tmp_path), report_to="none"))
    assert all(hasattr(trainer, name) for name in trainer_compat.TRAINER)
    assert isinstance(trainer.callback_handler, CallbackHandler)


def test_a_trainer_begins_with_the_default_callbacks_and_then_its_reporters(tmp_path, monkeypatch) -> None:
    import torch

    class Mine(TrainerCallback): ...

    monkeypatch.setattr(transformers.trainer, "DEFAULT_CALLBACKS", [*trainer_compat.DEFAULT_CALLBACKS, Mine])
    trainer = Trainer(torch.nn.Linear(1, 1), TrainingArguments(str(tmp_path), report_to="tensorboard"))
    names = [type(callback).__name__ for callback in trainer.callback_handler.callbacks]
    assert names.index("Mine") < names.index("TensorBoardCallback")


def test_a_trainer_that_is_being_made_is_found_by_its_first_event(tmp_path) -> None:
    import torch
    from peft import get_peft_model

    model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(4, 4)), SORSAConfig(r=2, target_modules=["0"]))
    trainer = Trainer(model, TrainingArguments(str(tmp_path), report_to="none"))
    assert "create_model_card" in vars(trainer)


def test_callbacks_hear_of_the_events_that_ours_answers() -> None:
    events = [name for ours in (SORSACallback, SORSAMetrics) for name in vars(ours) if name.startswith("on_")]
    assert all(hasattr(CallbackHandler, name) for name in events)


def test_trls_parser_has_the_methods_that_ours_extends() -> None:
    for theirs, methods in trl_compat.OVERRIDDEN.items():
        assert all(callable(getattr(theirs, name)) for name in methods)
        assert issubclass(RecipeParser, theirs)


def test_the_launchers_parser_takes_a_module_and_its_arguments() -> None:
    options = trl_compat.launch_command_parser().parse_args(
        ["--quiet", "--module", "sorsa_trl.train", "sft", "--x", "1"]
    )
    assert (options.module, options.training_script_args) == (True, ["sft", "--x", "1"])
    assert trl_compat.resolve_accelerate_config_argument(["--num_processes", "2"]) == ["--num_processes", "2"]
