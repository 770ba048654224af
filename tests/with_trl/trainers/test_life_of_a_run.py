"""What TRL's trainers promise of a `peft_config`, for SORSA beside LoRA: they train it, save it, resume it to the bit,
and what they saved loads and merges."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from builders.trl_runs import METHODS, TRAINERS, adapter_config, base_of, build, logged, logits_of
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer

STEPS, SAVED = 4, 2


@dataclass
class Run:
    """A finished run, with a checkpoint from its middle and the state of its model from before its first step."""

    method: str
    kind: str
    directory: Path
    trainer: Any
    before: dict[str, torch.Tensor]

    def again(self) -> Any:
        """Another trainer, made as this one was."""
        return new_trainer(self.method, self.kind, self.directory)


def new_trainer(method: str, kind: str, directory: Path) -> Any:
    saving = {"save_strategy": "steps", "save_steps": SAVED, "max_steps": STEPS, "learning_rate": 3e-3}
    return build(kind, directory, adapter_config(method, kind), **saving)


@pytest.fixture(scope="module", params=[(m, k) for k in TRAINERS for m in METHODS], ids=lambda case: "-".join(case))
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Run:
    method, kind = request.param
    directory = tmp_path_factory.mktemp("run")
    trainer = new_trainer(method, kind, directory)
    before = copy.deepcopy(trainer.model.state_dict())
    trainer.train()
    return Run(method, kind, directory, trainer, before)


def test_the_adapter_trains_and_nothing_else_changes(run: Run) -> None:
    after = run.trainer.model.state_dict()
    trained = {name for name, parameter in run.trainer.model.named_parameters() if parameter.requires_grad}
    changed = {name for name, tensor in run.before.items() if not torch.equal(after[name], tensor)}
    assert trained
    assert changed == trained
    assert len(logged(run.trainer, "loss")) == STEPS
    assert all(abs(loss) < float("inf") for loss in logged(run.trainer, "loss"))


def test_a_resumed_run_ends_with_the_same_weights_to_the_bit(run: Run) -> None:
    resumed = run.again()
    resumed.train(resume_from_checkpoint=str(run.directory / f"checkpoint-{SAVED}"))
    expected = run.trainer.model.state_dict()
    for name, tensor in resumed.model.state_dict().items():
        assert torch.equal(tensor, expected[name]), name
    assert logged(resumed, "loss") == logged(run.trainer, "loss")


@pytest.mark.parametrize("place", ["save_model", "checkpoint"])
def test_what_was_saved_loads_with_peft_to_the_bit(run: Run, place: str, tmp_path: Path) -> None:
    saved = run.directory / f"checkpoint-{STEPS}"
    if place == "save_model":
        saved = tmp_path
        run.trainer.save_model(str(saved))
    loaded = PeftModel.from_pretrained(base_of(run.kind), saved)
    assert torch.equal(logits_of(loaded), logits_of(run.trainer.model))
    assert not torch.equal(logits_of(loaded), logits_of(base_of(run.kind)))


def test_the_merged_model_computes_what_the_adapted_one_does(run: Run) -> None:
    """A copy of the trainer's model will not do: TRL's forward stays bound to the original.

    On a base of float64. The factors are fp32: the change of each projection is rounded once, which moves the logits
    by at most eps of the largest.
    """
    model = PeftModel.from_pretrained(base_of(run.kind).double(), run.directory / f"checkpoint-{STEPS}")
    adapted = logits_of(model)
    projections = sum(isinstance(module, BaseTunerLayer) for module in model.modules())
    bound = projections * torch.finfo(torch.float32).eps * adapted.abs().max()
    assert (logits_of(base_of(run.kind).double()) - adapted).abs().max() > 1e3 * bound
    merged = model.merge_and_unload()
    assert not [name for name in merged.state_dict() if "lora" in name or "sorsa" in name]
    assert (logits_of(merged) - adapted).abs().max() <= bound
