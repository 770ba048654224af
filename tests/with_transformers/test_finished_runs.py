"""A finished run that is resumed takes no further step, whatever trainer it has."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from builders.trainer_runs import adapted, make_trainer, trained_values
from transformers import Trainer, TrainerCallback


class Counts(TrainerCallback):
    """How many steps and trainings began and ended."""

    def __init__(self) -> None:
        self.steps = self.ends = 0

    def on_step_begin(self, *args: object, **kwargs: object) -> None:
        self.steps += 1

    def on_train_end(self, *args: object, **kwargs: object) -> None:
        self.ends += 1


def trainer_of(directory: Path, **options: object) -> tuple[Trainer, Counts]:
    counts = Counts()
    saving = {"save_strategy": "steps", "save_steps": 1, "learning_rate": 1e-3}
    return make_trainer(adapted(), directory, callbacks=[counts], **saving | options), counts


@pytest.mark.parametrize(
    "length", [{"max_steps": 3}, {"max_steps": -1, "num_train_epochs": 1, "examples": 4}], ids=["steps", "epochs"]
)
def test_a_finished_run_that_is_resumed_takes_no_more_steps(length: dict[str, int], tmp_path: Path, caplog) -> None:
    whole, counts = trainer_of(tmp_path, **length)
    whole.train()
    steps = counts.steps
    expected = trained_values(whole.model)
    for _ in range(2):
        resumed, counts = trainer_of(tmp_path, **length)
        result = resumed.train(resume_from_checkpoint=True)
        assert (counts.steps, counts.ends, result.global_step) == (0, 1, steps)
        found = trained_values(resumed.model)
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    if "examples" not in length:  # at the end of an epoch the Trainer itself takes none
        assert "All 3 steps of this run were taken before" in caplog.text


def test_a_run_that_is_made_longer_goes_on(tmp_path: Path) -> None:
    trainer_of(tmp_path, max_steps=3)[0].train()
    longer, counts = trainer_of(tmp_path, max_steps=5)
    longer.train(resume_from_checkpoint=True)
    assert counts.steps == 2
    assert longer.state.global_step == 5
